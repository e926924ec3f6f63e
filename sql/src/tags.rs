//! Tag columns: text to whoever asks, integers while a statement runs.
//!
//! A statement has one [`Dictionary`]. Every scan of the statement adds the tag values that its series carry while
//! the plan is made; when the first scan starts, the dictionary is closed and its values are numbered in sort order.
//! From then on a tag value is its *value ordinal* (`UInt32`, null for an absent tag) and a whole tag set its *set
//! ordinal*. [`rule`] rewrites a statement's plan so that predicates, grouping, sorting, joins and duplicate
//! elimination work on ordinals, and [`functions`] restore the text for the rows that are left.

pub mod dictionary;
pub mod filter;
pub mod functions;
pub mod rule;

pub use dictionary::Dictionary;
pub use rule::TagColumns;
