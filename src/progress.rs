//! How far a long command has come: a bar where standard error is a terminal, a line now and then where it is not.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Bytes done of bytes in all.
#[derive(Debug)]
pub struct Progress {
    what: &'static str,
    total: AtomicU64,
    done: AtomicU64,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Nothing is known yet; `what` is a verb, such as `reading`.
    pub fn new(what: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            let form = "{msg} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
            bar.with_style(ProgressStyle::with_template(form).unwrap_or_else(|_| ProgressStyle::default_bar()))
                .with_message(what)
        });
        Self { what, total: AtomicU64::new(0), done: AtomicU64::new(0), bar }
    }

    /// Nothing of `total` bytes is done.
    pub fn begin(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(0);
        }
    }

    /// So many bytes more are done.
    pub fn add(&self, bytes: u64) {
        let before = self.done.fetch_add(bytes, Ordering::Relaxed);
        if let Some(bar) = &self.bar {
            return bar.inc(bytes);
        }
        let total = self.total.load(Ordering::Relaxed);
        let tenths = |done: u64| (done * 10).checked_div(total).unwrap_or(10);
        if tenths(before) != tenths(before + bytes) {
            eprintln!("{}: {} of {}", self.what, HumanBytes(before + bytes), HumanBytes(total));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
