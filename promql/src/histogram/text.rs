//! Histograms as Prometheus prints them in labels and messages.

use std::fmt::{self, Write};

use super::{BucketView, FloatHistogram};
use crate::parse::go;

fn write_bucket(f: &mut fmt::Formatter<'_>, b: &BucketView) -> fmt::Result {
    f.write_str(", ")?;
    f.write_char(if b.lower_inclusive { '[' } else { '(' })?;
    write!(f, "{},{}", go::float(b.lower), go::float(b.upper))?;
    f.write_char(if b.upper_inclusive { ']' } else { ')' })?;
    write!(f, ":{}", go::float(b.count))
}

/// `{count:.., sum:.., [lower,upper):count, ..}` with the buckets that hold something, in ascending order.
impl fmt::Display for FloatHistogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{count:{}, sum:{}", go::float(self.count), go::float(self.sum))?;
        for b in self.negative.iter().rev().filter(|b| b.count != 0.0) {
            write_bucket(f, &self.negative_view(b))?;
        }
        if self.zero_count != 0.0 {
            write_bucket(f, &self.zero_view())?;
        }
        for b in self.positive.iter().filter(|b| b.count != 0.0) {
            write_bucket(f, &self.positive_view(b))?;
        }
        f.write_str("}")
    }
}
