//! Range kernels over (ts, value) slices; they know no language.
