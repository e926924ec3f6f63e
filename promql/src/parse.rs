//! The language: texts to syntax trees and back.
//!
//! `token` cuts a text into tokens, `parser` makes a tree of them, `check` sees to its types; [`print`] writes a tree as a
//! text and [`json`] as the Prometheus API shows it. What is accepted, where an error is and how it is worded are as in
//! Prometheus 3. Trees are at most [`DEPTH_MAX`] levels deep, so whatever walks one may recurse.

pub mod ast;
mod check;
mod functions;
pub(crate) mod go;
pub mod json;
mod parser;
pub mod print;
mod token;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use functions::Function;

use crate::options::Features;
use ast::{Expr, Selector};

/// Deepest nesting of expressions. Every level is a node that planning and evaluation nest in the one above.
pub const DEPTH_MAX: usize = 512;
/// Most operands of an expression. Each becomes nodes of the plan, which take some kilobytes.
pub const OPERANDS_MAX: usize = 20_000;

/// A place in a text: line and column from 1 on, columns in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Position {
    /// The line.
    pub line: u32,
    /// The byte of that line.
    pub column: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Where the lines of a text begin, for turning offsets into positions.
#[derive(Debug, Clone)]
pub struct Lines(Vec<usize>);

impl Lines {
    /// Of a text.
    pub fn new(text: &str) -> Self {
        Self(text.bytes().enumerate().filter(|(_, b)| *b == b'\n').map(|(at, _)| at + 1).collect())
    }

    /// The position of a byte.
    pub fn position(&self, at: usize) -> Position {
        let line = self.0.partition_point(|start| *start <= at);
        let start = line.checked_sub(1).map_or(0, |before| self.0[before]);
        Position { line: line as u32 + 1, column: (at - start) as u32 + 1 }
    }
}

/// Why a text is not PromQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The byte that it is about.
    pub at: usize,
    /// What is wrong there.
    pub message: String,
}

impl Error {
    fn new(at: usize, message: impl Into<String>) -> Self {
        Self { at, message: message.into() }
    }

    /// The error in words, for the text that it came from.
    pub fn describe(&self, text: &str) -> String {
        if text.is_empty() {
            return format!("unknown position: parse error: {}", self.message);
        }
        format!("{}: parse error: {}", Lines::new(text).position(self.at), self.message)
    }
}

/// Parses and checks an expression.
///
/// # Errors
/// What is wrong with it and where; the first of several.
pub fn parse(text: &str, features: &Features) -> Result<Expr, Error> {
    let mut expr = parser::expression(text, features)?;
    check::expression(&mut expr)?;
    Ok(expr)
}

/// Parses a selector alone, such as `up{job="x"}`. It may choose every series.
///
/// # Errors
/// What is wrong with it and where; the first of several.
pub fn parse_selector(text: &str) -> Result<Selector, Error> {
    parser::selector(text)
}

#[cfg(test)]
mod tests;
