//! A cursor over the protobuf wire format: varints, fixed 64-bit values and length-delimited slices, nothing copied and
//! nothing allocated.
//!
//! A decoder reads keys with [`Cursor::key`] and matches them against [`varint_key`], [`fixed64_key`] and [`len_key`]
//! constants; whatever does not match goes to [`Cursor::skip`], which refuses a known field that comes with the wrong
//! wire type and passes over an unknown one. What is accepted is what protobuf's own decoders accept. Errors carry the
//! offset in the message where reading failed.

use std::fmt;

use catalog::Error;

/// Groups nested deeper than this are refused.
const GROUP_DEPTH_MAX: usize = 64;

/// The key of a varint field.
pub const fn varint_key(field: u32) -> u32 {
    field << 3
}

/// The key of a field of eight bytes.
pub const fn fixed64_key(field: u32) -> u32 {
    field << 3 | 1
}

/// The key of a field that states its length: text, bytes, messages, packed numbers.
pub const fn len_key(field: u32) -> u32 {
    field << 3 | 2
}

/// Bytes that are not protobuf, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireError {
    /// Bytes from the start of the outermost message.
    pub offset: usize,
    /// What is wrong there.
    pub what: &'static str,
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a valid protobuf message: {} at byte {}", self.what, self.offset)
    }
}

impl From<WireError> for Error {
    fn from(e: WireError) -> Self {
        Error::invalid(e.to_string())
    }
}

/// Result of reading the wire format.
pub type Result<T> = std::result::Result<T, WireError>;

/// A position in a message.
#[derive(Debug, Clone)]
pub struct Cursor<'a> {
    rest: &'a [u8],
    /// Offset in the outermost message of the end of `rest`.
    end: usize,
}

impl<'a> Cursor<'a> {
    /// At the start of an outermost message.
    pub fn new(message: &'a [u8]) -> Self {
        Self { rest: message, end: message.len() }
    }

    /// Offset in the outermost message.
    pub fn offset(&self) -> usize {
        self.end - self.rest.len()
    }

    /// What is left of this message.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Passes over bytes that were read before from a clone.
    ///
    /// # Panics
    /// When the message has less left.
    #[inline]
    pub fn advance(&mut self, bytes: usize) {
        self.rest = &self.rest[bytes..];
    }

    /// True at the end of this message.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// An error at this position.
    #[cold]
    pub fn error(&self, what: &'static str) -> WireError {
        WireError { offset: self.offset(), what }
    }

    /// Reads a varint.
    #[inline]
    pub fn varint(&mut self) -> Result<u64> {
        match self.rest {
            [b, tail @ ..] if *b < 0x80 => {
                self.rest = tail;
                Ok(u64::from(*b))
            }
            _ => self.varint_long(),
        }
    }

    #[inline]
    fn varint_long(&mut self) -> Result<u64> {
        let mut v = 0u64;
        for (i, b) in self.rest.iter().take(10).enumerate() {
            // The tenth byte holds the topmost bit alone.
            if i == 9 && *b > 1 {
                return Err(self.error("a varint of over 64 bits"));
            }
            v |= u64::from(b & 0x7f) << (7 * i);
            if *b < 0x80 {
                self.rest = &self.rest[i + 1..];
                return Ok(v);
            }
        }
        Err(self.error("an unfinished varint"))
    }

    /// Reads the next key, or `None` at the end.
    #[inline]
    pub fn key(&mut self) -> Result<Option<u32>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let start = self.clone();
        let key = self.varint()?;
        // Field 0 does not exist; numbers have at most 29 bits.
        if key > u64::from(u32::MAX) || key < 8 {
            return Err(start.error("an invalid field number"));
        }
        Ok(Some(key as u32))
    }

    /// Reads a double, little-endian.
    #[inline]
    pub fn double(&mut self) -> Result<f64> {
        match self.rest.split_first_chunk::<8>() {
            Some((b, tail)) => {
                self.rest = tail;
                Ok(f64::from_bits(u64::from_le_bytes(*b)))
            }
            None => Err(self.error("an unfinished 64-bit value")),
        }
    }

    /// Reads a length and that many bytes.
    #[inline]
    pub fn bytes(&mut self) -> Result<&'a [u8]> {
        let len = self.varint()?;
        if len > self.rest.len() as u64 {
            return Err(self.error("a length that reaches beyond its message"));
        }
        let (head, tail) = self.rest.split_at(len as usize);
        self.rest = tail;
        Ok(head)
    }

    /// Reads a length and returns a cursor over that many bytes.
    #[inline]
    pub fn message(&mut self) -> Result<Cursor<'a>> {
        let bytes = self.bytes()?;
        Ok(Cursor { rest: bytes, end: self.offset() })
    }

    /// Passes over the value of a key that no decoder's arm took: an unknown field, unless its number is in `known`,
    /// in which case it has the wrong wire type.
    ///
    /// # Errors
    /// For a known field, for groups that don't match and for what isn't protobuf.
    #[inline(never)]
    pub fn skip(&mut self, key: u32, known: std::ops::RangeInclusive<u32>) -> Result<()> {
        if known.contains(&(key >> 3)) {
            return Err(self.error("a field with the wrong wire type"));
        }
        let mut open = [0u32; GROUP_DEPTH_MAX];
        let mut depth = 0;
        let mut key = key;
        loop {
            match key & 7 {
                0 => {
                    self.varint()?;
                }
                1 => {
                    self.double()?;
                }
                2 => {
                    self.bytes()?;
                }
                3 if depth == GROUP_DEPTH_MAX => return Err(self.error("groups that are nested too deeply")),
                3 => {
                    open[depth] = key >> 3;
                    depth += 1;
                }
                4 if depth > 0 && open[depth - 1] == key >> 3 => depth -= 1,
                4 => return Err(self.error("the end of a group that was not begun")),
                5 => match self.rest.split_first_chunk::<4>() {
                    Some((_, tail)) => self.rest = tail,
                    None => return Err(self.error("an unfinished 32-bit value")),
                },
                _ => return Err(self.error("an invalid wire type")),
            }
            if depth == 0 {
                return Ok(());
            }
            key = self.key()?.ok_or(self.error("an unfinished group"))?;
        }
    }
}

/// Undoes the zigzag coding of signed numbers.
pub const fn zigzag(v: u64) -> i64 {
    (v >> 1) as i64 ^ -((v & 1) as i64)
}

/// Undoes the zigzag coding of signed 32-bit numbers; higher bits are dropped, as protobuf does.
pub const fn zigzag32(v: u64) -> i32 {
    let v = v as u32;
    (v >> 1) as i32 ^ -((v & 1) as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_varint(bytes: &[u8], expected: std::result::Result<u64, &str>) {
        let got = Cursor::new(bytes).varint().map_err(|e| e.what);
        assert_eq!(got, expected, "{bytes:02x?}");
    }

    #[test]
    fn varints() {
        check_varint(&[0], Ok(0));
        check_varint(&[0x7f], Ok(127));
        check_varint(&[0x80, 1], Ok(128));
        check_varint(&[0xff; 9], Err("an unfinished varint"));
        check_varint(&[], Err("an unfinished varint"));
        check_varint(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1], Ok(u64::MAX));
        check_varint(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2], Err("a varint of over 64 bits"));
        check_varint(&[0x80, 0x80, 0x80, 0], Ok(0));
    }

    #[test]
    fn zigzags() {
        for v in [0, 1, -1, 63, -64, i64::MAX, i64::MIN] {
            assert_eq!(zigzag(((v << 1) ^ (v >> 63)) as u64), v);
        }
        for v in [0, 1, -1, i32::MAX, i32::MIN] {
            assert_eq!(zigzag32(u64::from(((v << 1) ^ (v >> 31)) as u32)), v);
        }
    }

    fn check_skip(bytes: &[u8], expected: std::result::Result<(), (usize, &str)>) {
        let mut c = Cursor::new(bytes);
        let mut run = || {
            while let Some(key) = c.key()? {
                c.skip(key, 1..=3)?;
            }
            Ok(())
        };
        assert_eq!(run().map_err(|e: WireError| (e.offset, e.what)), expected, "{bytes:02x?}");
    }

    #[test]
    fn skipping() {
        check_skip(&[0x20, 0x05, 0x21, 0, 0, 0, 0, 0, 0, 0, 0, 0x22, 2, 9, 9, 0x25, 1, 2, 3, 4], Ok(()));
        check_skip(&[0x08, 0x05], Err((1, "a field with the wrong wire type")));
        check_skip(&[0x22, 5, 0], Err((2, "a length that reaches beyond its message")));
        check_skip(
            &[0x22, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
            Err((11, "a length that reaches beyond its message")),
        );
        check_skip(&[0x00, 0x05], Err((0, "an invalid field number")));
        check_skip(&[0x26], Err((1, "an invalid wire type")));
        // Field 4 as a group with a varint inside, then again unfinished, then with another end.
        check_skip(&[0x23, 0x28, 1, 0x24], Ok(()));
        check_skip(&[0x23, 0x28, 1], Err((3, "an unfinished group")));
        check_skip(&[0x23, 0x2c], Err((2, "the end of a group that was not begun")));
        check_skip(&[0x24], Err((1, "the end of a group that was not begun")));
        check_skip(&[0x23; 100], Err((65, "groups that are nested too deeply")));
    }

    #[test]
    fn nested_offsets_are_absolute() {
        let bytes = [0x0a, 3, 0x12, 9, 0];
        let mut outer = Cursor::new(&bytes);
        assert_eq!(outer.key(), Ok(Some(len_key(1))));
        let mut inner = outer.message().unwrap();
        assert_eq!(inner.offset(), 2);
        assert_eq!(inner.key(), Ok(Some(len_key(2))));
        assert_eq!(inner.bytes().map_err(|e| e.offset), Err(4));
        assert!(outer.is_empty());
    }
}
