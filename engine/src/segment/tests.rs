//! Segments written and read back, whole and in part, sound and damaged.
