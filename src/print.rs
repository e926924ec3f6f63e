//! What commands print to standard output.

use std::fmt::Display;
use std::io::{ErrorKind, Write as _};

use anyhow::{Context as _, Result};

/// Prints a text as it is. Whoever closes the pipe, as `head` does, has read enough: the rest goes nowhere, and what the
/// command does beside printing, and its exit status, stay what they are.
///
/// # Errors
/// Output that can't be written for another reason, such as a full disk.
pub fn text(text: impl Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match write!(out, "{text}").and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to standard output"),
    }
}

/// Prints a line, as [`text`] does.
///
/// # Errors
/// Those of [`text`].
pub fn line(line: impl Display) -> Result<()> {
    text(format_args!("{line}\n"))
}
