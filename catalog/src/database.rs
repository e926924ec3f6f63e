//! What a database is, kept in its bucket: its description and the metadata of metrics. With these and the footers of
//! its files the SQL file catalog can be made again.
