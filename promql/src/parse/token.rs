//! The lexer: a text to tokens, one at a time.
//!
//! What a character means depends on where it stands: in braces every word is a label's name, in brackets there are only
//! durations. A text that is no token is an error with the place where the token would begin, in Prometheus's words.

use super::ast::{AggregateOp, Operator, Span};
use super::{Error, go};

/// Kinds of tokens. Words that mean something in one place are names in others, so the parser decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Something that is no token.
    Invalid,
    End,
    Comma,
    Colon,
    LeftParen,
    RightParen,
    LeftBrace,
    RightBrace,
    LeftBracket,
    RightBracket,
    /// `=` alone.
    Assign,
    Identifier,
    /// A name with a colon in it.
    MetricIdentifier,
    Text,
    Number,
    Duration,
    Operator(Operator),
    /// `=~`, in braces only.
    Matches,
    /// `!~`, in braces only.
    MatchesNot,
    At,
    Aggregate(AggregateOp),
    Bool,
    By,
    GroupLeft,
    GroupRight,
    Fill,
    FillLeft,
    FillRight,
    Ignoring,
    Offset,
    Smoothed,
    Anchored,
    On,
    Without,
    EvalStart,
    EvalEnd,
    Step,
    Range,
    MaxOf,
    MinOf,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) span: Span,
}

impl Token {
    /// How an error calls it.
    pub(super) fn describe(&self, text: &str) -> String {
        let value = &text[self.span.start..self.span.end];
        let short = || match value.char_indices().nth(10) {
            Some((cut, _)) if value.len() > 10 => format!("{}...", go::quote(&value[..cut])),
            _ => go::quote(value),
        };
        match self.kind {
            Kind::End => "end of input".to_owned(),
            Kind::Identifier => format!("identifier {}", go::quote(value)),
            Kind::MetricIdentifier => format!("metric identifier {}", go::quote(value)),
            Kind::Text => format!("string {}", short()),
            Kind::Number => format!("number {}", short()),
            Kind::Duration => format!("duration {}", short()),
            Kind::Operator(_) | Kind::Matches | Kind::MatchesNot | Kind::At => format!("<op:{value}>"),
            Kind::Aggregate(_) => format!("<aggr:{value}>"),
            Kind::Bool
            | Kind::By
            | Kind::GroupLeft
            | Kind::GroupRight
            | Kind::Fill
            | Kind::FillLeft
            | Kind::FillRight
            | Kind::Ignoring
            | Kind::Offset
            | Kind::Smoothed
            | Kind::Anchored
            | Kind::On
            | Kind::Without => format!("<{value}>"),
            _ => short(),
        }
    }
}

/// What a word means outside of braces, letters of any case.
fn keyword(word: &str) -> Option<Kind> {
    // The longest is `count_values`.
    let mut lower = [0u8; 12];
    let lower = lower.get_mut(..word.len())?;
    lower.copy_from_slice(word.as_bytes());
    lower.make_ascii_lowercase();
    Some(match &*lower {
        b"and" => Kind::Operator(Operator::And),
        b"or" => Kind::Operator(Operator::Or),
        b"unless" => Kind::Operator(Operator::Unless),
        b"atan2" => Kind::Operator(Operator::Atan2),
        b"offset" => Kind::Offset,
        b"smoothed" => Kind::Smoothed,
        b"anchored" => Kind::Anchored,
        b"by" => Kind::By,
        b"without" => Kind::Without,
        b"on" => Kind::On,
        b"ignoring" => Kind::Ignoring,
        b"group_left" => Kind::GroupLeft,
        b"group_right" => Kind::GroupRight,
        b"fill" => Kind::Fill,
        b"fill_left" => Kind::FillLeft,
        b"fill_right" => Kind::FillRight,
        b"bool" => Kind::Bool,
        b"start" => Kind::EvalStart,
        b"end" => Kind::EvalEnd,
        b"inf" | b"nan" => Kind::Number,
        other => {
            let word = std::str::from_utf8(other).ok()?;
            return AggregateOp::named(word).map(Kind::Aggregate).or_else(|| duration_keyword(word));
        }
    })
}

/// The words that durations are made of, besides numbers.
fn duration_keyword(lower: &str) -> Option<Kind> {
    Some(match lower {
        "step" => Kind::Step,
        "range" => Kind::Range,
        "max_of" => Kind::MaxOf,
        "min_of" => Kind::MinOf,
        _ => return None,
    })
}

fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

fn is_alpha(c: char) -> bool {
    c == '_' || c.is_ascii_alphabetic()
}

fn is_alphanumeric(c: char) -> bool {
    is_alpha(c) || c.is_ascii_digit()
}

#[derive(Debug)]
pub(super) struct Lexer<'a> {
    text: &'a str,
    at: usize,
    /// Where the token begins that is being read.
    start: usize,
    parens: usize,
    in_braces: bool,
    in_brackets: bool,
    /// In brackets before their first number.
    at_length: bool,
    /// A colon was seen since the bracket.
    colon: bool,
    /// A number was seen in any bracket.
    length: bool,
}

type Result<T> = std::result::Result<T, Error>;

impl<'a> Lexer<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self {
            text,
            at: 0,
            start: 0,
            parens: 0,
            in_braces: false,
            in_brackets: false,
            at_length: false,
            colon: false,
            length: false,
        }
    }

    /// The next token; the end again and again.
    pub(super) fn next(&mut self) -> Result<Token> {
        loop {
            self.start = self.at;
            let kind = if self.in_braces {
                self.brace_token()?
            } else if self.at_length {
                self.length_token()?
            } else {
                self.token()?
            };
            if let Some(kind) = kind {
                return Ok(Token { kind, span: Span { start: self.start, end: self.at } });
            }
        }
    }

    fn peek(&self) -> Option<char> {
        match self.text.as_bytes().get(self.at) {
            Some(b) if b.is_ascii() => Some(char::from(*b)),
            Some(_) => self.text[self.at..].chars().next(),
            None => None,
        }
    }

    fn bump(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn accept(&mut self, of: impl Fn(char) -> bool) -> bool {
        match self.peek() {
            Some(c) if of(c) => {
                self.at += c.len_utf8();
                true
            }
            _ => false,
        }
    }

    fn skip(&mut self, of: impl Fn(char) -> bool) {
        while self.accept(&of) {}
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::new(self.start, message))
    }

    /// An error about what follows the token just read.
    fn error_after<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::new(self.at, message))
    }

    fn comment(&mut self) {
        self.skip(|c| c != '\n' && c != '\r');
    }

    /// A token, or nothing for blanks and comments.
    fn token(&mut self) -> Result<Option<Kind>> {
        let Some(c) = self.bump() else {
            if self.parens > 0 {
                return self.error("unclosed left parenthesis");
            }
            if self.in_brackets {
                return self.error("unclosed left bracket");
            }
            return Ok(Some(Kind::End));
        };
        Ok(Some(match c {
            '#' => {
                self.comment();
                return Ok(None);
            }
            c if is_space(c) => {
                self.skip(is_space);
                return Ok(None);
            }
            ',' => Kind::Comma,
            '*' => Kind::Operator(Operator::Mul),
            '/' => Kind::Operator(Operator::Div),
            '%' => Kind::Operator(Operator::Mod),
            '+' => Kind::Operator(Operator::Add),
            '-' => Kind::Operator(Operator::Sub),
            '^' => Kind::Operator(Operator::Pow),
            '@' => Kind::At,
            '=' => match self.peek() {
                Some('=') => {
                    self.at += 1;
                    Kind::Operator(Operator::Eq)
                }
                Some('~') => return self.error("unexpected character after '=': '~'"),
                _ => Kind::Assign,
            },
            '!' => match self.bump() {
                Some('=') => Kind::Operator(Operator::Ne),
                other => return self.error(format!("unexpected character after '!': {}", go::quote_char(other))),
            },
            '<' => Kind::Operator(self.either(Operator::Le, Operator::TrimUpper, Operator::Lt)),
            '>' => Kind::Operator(self.either(Operator::Ge, Operator::TrimLower, Operator::Gt)),
            '.' if self.peek().is_some_and(|c| c.is_ascii_digit()) => self.number_or_duration()?,
            c if c.is_ascii_digit() => self.number_or_duration()?,
            '"' | '\'' => self.string(c)?,
            '`' => self.raw_string()?,
            c if is_alpha(c) || c == ':' => {
                if !self.in_brackets {
                    return Ok(Some(self.word()));
                }
                if c == ':' {
                    if self.colon {
                        return self.error("unexpected colon ':'");
                    }
                    self.colon = true;
                    Kind::Colon
                } else {
                    match self.duration_word(c) {
                        Some(kind) => kind,
                        None => {
                            return self
                                .error(format!("unexpected character: {}, expected ':'", go::quote_char(Some(c))));
                        }
                    }
                }
            }
            '(' => {
                self.parens += 1;
                Kind::LeftParen
            }
            ')' => self.right_paren()?,
            '{' => {
                self.in_braces = true;
                Kind::LeftBrace
            }
            '[' => {
                if self.in_brackets {
                    return self.error("unexpected left bracket '['");
                }
                (self.in_brackets, self.at_length, self.colon) = (true, true, false);
                Kind::LeftBracket
            }
            ']' => {
                if !self.in_brackets {
                    return self.error("unexpected right bracket ']'");
                }
                self.in_brackets = false;
                Kind::RightBracket
            }
            other => return self.error(format!("unexpected character: {}", go::quote_char(Some(other)))),
        }))
    }

    fn either(&mut self, with_equal: Operator, with_slash: Operator, alone: Operator) -> Operator {
        let operator = match self.peek() {
            Some('=') => with_equal,
            Some('/') => with_slash,
            _ => return alone,
        };
        self.at += 1;
        operator
    }

    fn right_paren(&mut self) -> Result<Kind> {
        if self.parens == 0 {
            return self.error_after("unexpected right parenthesis ')'");
        }
        self.parens -= 1;
        Ok(Kind::RightParen)
    }

    /// A token in brackets before their first number.
    fn length_token(&mut self) -> Result<Option<Kind>> {
        let Some(c) = self.bump() else {
            return self.error("unexpected end of input in duration expression");
        };
        Ok(Some(match c {
            c if is_space(c) => {
                self.skip(is_space);
                return Ok(None);
            }
            ']' => {
                (self.in_brackets, self.at_length, self.colon) = (false, false, false);
                Kind::RightBracket
            }
            ':' => {
                if !self.length {
                    return self.error_after("unexpected colon before duration in duration expression");
                }
                if self.colon {
                    return self.error_after("unexpected repeated colon in duration expression");
                }
                self.colon = true;
                Kind::Colon
            }
            '(' => {
                self.parens += 1;
                Kind::LeftParen
            }
            ')' => self.right_paren()?,
            '+' => Kind::Operator(Operator::Add),
            '-' => Kind::Operator(Operator::Sub),
            '*' => Kind::Operator(Operator::Mul),
            '/' => Kind::Operator(Operator::Div),
            '%' => Kind::Operator(Operator::Mod),
            '^' => Kind::Operator(Operator::Pow),
            ',' => Kind::Comma,
            c if c.is_ascii_digit() || (c == '.' && self.peek().is_some_and(|c| c.is_ascii_digit())) => {
                (self.length, self.at_length) = (true, false);
                self.number_or_duration()?
            }
            other => match self.duration_word(other) {
                Some(kind) => kind,
                None => {
                    let shown = go::quote_char(Some(other));
                    return self.error(format!("unexpected character in duration expression: {shown}"));
                }
            },
        }))
    }

    /// A token in braces, where every word is a name.
    fn brace_token(&mut self) -> Result<Option<Kind>> {
        let Some(c) = self.bump() else { return self.error("unexpected end of input inside braces") };
        Ok(Some(match c {
            '#' => {
                self.comment();
                return Ok(None);
            }
            c if is_space(c) => {
                self.skip(is_space);
                return Ok(None);
            }
            c if is_alpha(c) => {
                self.skip(is_alphanumeric);
                Kind::Identifier
            }
            ',' => Kind::Comma,
            '"' | '\'' => self.string(c)?,
            '`' => self.raw_string()?,
            '=' => {
                if self.accept(|c| c == '~') {
                    Kind::Matches
                } else {
                    Kind::Assign
                }
            }
            '!' => match self.bump() {
                Some('~') => Kind::MatchesNot,
                Some('=') => Kind::Operator(Operator::Ne),
                other => {
                    let shown = go::quote_char(other);
                    return self.error(format!("unexpected character after '!' inside braces: {shown}"));
                }
            },
            '{' => return self.error("unexpected left brace '{'"),
            '}' => {
                self.in_braces = false;
                Kind::RightBrace
            }
            other => return self.error(format!("unexpected character inside braces: {}", go::quote_char(Some(other)))),
        }))
    }

    /// A keyword or a name.
    fn word(&mut self) -> Kind {
        self.skip(|c| is_alphanumeric(c) || c == ':');
        let word = &self.text[self.start..self.at];
        match keyword(word) {
            // These are younger than metrics of their name.
            Some(Kind::Fill | Kind::FillLeft | Kind::FillRight)
                if !self.text[self.at..].trim_start_matches(is_space).starts_with('(') =>
            {
                Kind::Identifier
            }
            Some(kind) => kind,
            None if word.contains(':') => Kind::MetricIdentifier,
            None => Kind::Identifier,
        }
    }

    /// The rest of a word in brackets that begins with `first`.
    fn duration_word(&mut self, first: char) -> Option<Kind> {
        if !matches!(first, 's' | 'S' | 'r' | 'R' | 'm' | 'M') {
            return None;
        }
        self.skip(is_alpha);
        duration_keyword(&self.text[self.start..self.at].to_ascii_lowercase())
    }

    fn string(&mut self, quote: char) -> Result<Kind> {
        loop {
            match self.bump() {
                Some('\\') => self.escape(quote)?,
                // What was no UTF-8 when it came in.
                Some(char::REPLACEMENT_CHARACTER) => return self.error("invalid UTF-8 rune"),
                None | Some('\n') => return self.error("unterminated quoted string"),
                Some(c) if c == quote => return Ok(Kind::Text),
                Some(_) => {}
            }
        }
    }

    fn raw_string(&mut self) -> Result<Kind> {
        loop {
            match self.bump() {
                Some(char::REPLACEMENT_CHARACTER) => return self.error("invalid UTF-8 rune"),
                None => return self.error("unterminated raw string"),
                Some('`') => return Ok(Kind::Text),
                Some(_) => {}
            }
        }
    }

    /// What follows a backslash.
    fn escape(&mut self, quote: char) -> Result<()> {
        let (digits, base, max) = match self.peek() {
            Some('a' | 'b' | 'f' | 'n' | 'r' | 't' | 'v' | '\\') => {
                self.at += 1;
                return Ok(());
            }
            Some(c) if c == quote => {
                self.at += 1;
                return Ok(());
            }
            Some('0'..='7') => (3, 8, 255),
            Some('x') => (2, 16, 255),
            Some('u') => (4, 16, 0x10_ffff),
            Some('U') => (8, 16, 0x10_ffff),
            None => return self.error("escape sequence not terminated"),
            Some(c) => return self.error(format!("unknown escape sequence {}", go::code_point(c))),
        };
        if base == 16 {
            self.at += 1;
        }
        let mut code: u32 = 0;
        for _ in 0..digits {
            let Some(c) = self.bump() else { return self.error("escape sequence not terminated") };
            let Some(digit) = c.to_digit(base) else {
                return self.error(format!("illegal character {} in escape sequence", go::code_point(c)));
            };
            code = code.wrapping_mul(base).wrapping_add(digit);
        }
        if code > max || (0xd800..0xe000).contains(&code) {
            return self.error("escape sequence is an invalid Unicode code point");
        }
        Ok(())
    }

    fn number_or_duration(&mut self) -> Result<Kind> {
        self.at = self.start;
        if self.number() {
            return Ok(Kind::Number);
        }
        if self.rest_of_duration() {
            return Ok(Kind::Duration);
        }
        self.error(format!("bad number or duration syntax: {}", go::quote(&self.text[self.start..self.at])))
    }

    /// The units and further numbers of a duration whose first number was read.
    fn rest_of_duration(&mut self) -> bool {
        let mut units = "smhdwy";
        loop {
            if !self.accept(|c| units.contains(c)) {
                return false;
            }
            self.accept(|c| c == 's');
            if !self.accept(|c| c.is_ascii_digit()) {
                // What follows is part of the text that an error shows.
                return !self.accept(is_alphanumeric);
            }
            self.skip(|c| c.is_ascii_digit());
            units = "smhdw";
        }
    }

    /// Reads what may be a number as far as it may be one; says whether it is.
    fn number(&mut self) -> bool {
        let mut hex = false;
        if self.accept(|c| c == '0') && self.accept(|c| matches!(c, 'x' | 'X')) {
            self.accept(|c| c == '_');
            hex = true;
        }
        let is_digit = move |c: char| if hex { c.is_ascii_hexdigit() } else { c.is_ascii_digit() };
        let is_exponent = |c: char| matches!(c, 'e' | 'E');
        self.accept(|c| c == '.');
        self.accept(is_digit);
        let (mut dot, mut exponent) = (false, false);
        while let Some(c) = self.peek().filter(|c| is_digit(*c) || matches!(c, '.' | '_') || is_exponent(*c)) {
            if (c == '.' && dot) || (is_exponent(c) && exponent) {
                self.at += 1;
                return false;
            }
            if c == '.' {
                self.at += 1;
                dot = true;
                if self.accept(|c| matches!(c, '_' | '.')) || hex {
                    return false;
                }
            } else if is_exponent(c) {
                self.at += 1;
                exponent = true;
                self.accept(|c| matches!(c, '+' | '-'));
                if self.accept(|c| matches!(c, '.' | '_' | 'e' | 'E')) || self.peek().is_none() {
                    return false;
                }
            } else if c == '_' {
                self.at += 1;
                if self.accept(|c| matches!(c, '.' | '_' | 'e' | 'E')) || self.peek().is_none() {
                    return false;
                }
            } else {
                self.skip(is_digit);
            }
        }
        !self.peek().is_some_and(is_alphanumeric)
    }
}
