//! Bytes and bits of Prometheus's files: big-endian numbers, variable-length numbers, bit streams, checksums.
//!
//! Whatever ends too early or makes no sense is an error, never a panic: files may be damaged.

pub use promql::chunk::crc32c;

/// What is wrong with bytes.
pub type Result<T> = std::result::Result<T, Damage>;

/// Bytes that are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage(pub String);

impl Damage {
    /// Damage with this description.
    pub fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }

    fn short() -> Self {
        Self::new("ends too early")
    }
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Damage {}

/// Checks that `bytes` have this sum.
pub fn check_sum(bytes: &[u8], stored: u32) -> Result<()> {
    let real = crc32c(bytes);
    if real == stored { Ok(()) } else { Err(Damage::new(format!("checksum is {real:08x}, stored is {stored:08x}"))) }
}

/// A position in bytes.
#[derive(Debug, Clone)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// At the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// At `offset` of `bytes`.
    pub fn at(bytes: &'a [u8], offset: u64) -> Result<Self> {
        let rest = usize::try_from(offset).ok().and_then(|o| bytes.get(o..));
        rest.map(Self).ok_or_else(|| Damage::new(format!("offset {offset} is beyond its {} bytes", bytes.len())))
    }

    /// What is left.
    pub fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// True at the end.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: u64) -> Result<&'a [u8]> {
        let len = usize::try_from(len).map_err(|_| Damage::short())?;
        let (head, tail) = self.0.split_at_checked(len).ok_or_else(Damage::short)?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk().ok_or_else(Damage::short)?;
        self.0 = tail;
        Ok(*head)
    }

    /// A byte.
    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    /// Two bytes, big-endian.
    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    /// Four bytes, big-endian.
    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// Eight bytes, big-endian.
    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// A double, big-endian.
    pub fn f64(&mut self) -> Result<f64> {
        Ok(f64::from_bits(self.u64()?))
    }

    /// A number of 7 bits a byte, lowest first.
    pub fn uvarint(&mut self) -> Result<u64> {
        let mut v = 0;
        for i in 0..10 {
            let b = self.u8()?;
            if i == 9 && b > 1 {
                break;
            }
            v |= u64::from(b & 0x7f) << (7 * i);
            if b < 0x80 {
                return Ok(v);
            }
        }
        Err(Damage::new("holds a number of more than 64 bits"))
    }

    /// The same, zigzag coded.
    pub fn varint(&mut self) -> Result<i64> {
        let v = self.uvarint()?;
        Ok((v >> 1) as i64 ^ -((v & 1) as i64))
    }

    /// A length and that many bytes of text.
    pub fn text(&mut self) -> Result<&'a str> {
        let len = self.uvarint()?;
        std::str::from_utf8(self.bytes(len)?).map_err(|_| Damage::new("holds a text that is not UTF-8"))
    }

    /// Four bytes of length, that many bytes, and their checksum.
    pub fn section(&mut self) -> Result<Self> {
        let len = self.u32()?;
        let bytes = self.bytes(u64::from(len))?;
        check_sum(bytes, self.u32()?)?;
        Ok(Self(bytes))
    }
}

/// A position in a stream of bits, the highest of each byte first.
#[derive(Debug, Clone)]
pub struct Bits<'a> {
    bytes: &'a [u8],
    /// Bits read so far.
    at: usize,
}

impl<'a> Bits<'a> {
    /// At the first bit of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// The next `count` bits, at most 64, as the low bits of a number.
    pub fn bits(&mut self, count: u32) -> Result<u64> {
        if count as usize > 8 * self.bytes.len() - self.at {
            return Err(Damage::short());
        }
        let mut out = 0u64;
        let mut left = count;
        while left > 0 {
            let free = 8 - (self.at % 8) as u32;
            let take = free.min(left);
            let byte = u64::from(self.bytes[self.at / 8]);
            let bits = byte >> (free - take) & ((1 << take) - 1);
            out = out << take | bits;
            self.at += take as usize;
            left -= take;
        }
        Ok(out)
    }

    /// The next bit.
    pub fn bit(&mut self) -> Result<bool> {
        Ok(self.bits(1)? == 1)
    }

    /// How many of the next bits, at most `max`, are ones before the first zero, which is read too.
    pub fn ones(&mut self, max: u32) -> Result<u32> {
        for count in 0..max {
            if !self.bit()? {
                return Ok(count);
            }
        }
        Ok(max)
    }

    /// A signed number of `count` bits of which, unlike in two's complement, the middle value is positive.
    pub fn signed(&mut self, count: u32) -> Result<i64> {
        let bits = self.bits(count)?;
        let negative = count < 64 && bits > 1 << (count - 1);
        Ok(if negative { bits.wrapping_sub(1 << count) as i64 } else { bits as i64 })
    }

    /// As [`Reader::uvarint`], from any bit on.
    pub fn unsigned_bytes(&mut self) -> Result<u64> {
        let mut v = 0;
        for i in 0..10 {
            let b = self.bits(8)?;
            if i == 9 && b > 1 {
                break;
            }
            v |= (b & 0x7f) << (7 * i);
            if b < 0x80 {
                return Ok(v);
            }
        }
        Err(Damage::new("holds a number of more than 64 bits"))
    }

    /// As [`Reader::varint`], from any bit on.
    pub fn signed_bytes(&mut self) -> Result<i64> {
        let v = self.unsigned_bytes()?;
        Ok((v >> 1) as i64 ^ -((v & 1) as i64))
    }

    /// A double.
    pub fn f64(&mut self) -> Result<f64> {
        Ok(f64::from_bits(self.bits(64)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_checked() {
        assert!(check_sum(b"123456789", 0xe306_9283).is_ok());
        assert_eq!(check_sum(b"", 1), Err(Damage::new("checksum is 00000000, stored is 00000001")));
    }

    #[test]
    fn numbers() {
        let mut r = Reader::new(&[1, 0, 2, 0, 0, 0, 3, 0xac, 0x02, 0x03, 2, b'a', b'b', 9]);
        assert_eq!((r.u8(), r.u16(), r.u32()), (Ok(1), Ok(2), Ok(3)));
        assert_eq!((r.uvarint(), r.varint(), r.text(), r.u8()), (Ok(300), Ok(-2), Ok("ab"), Ok(9)));
        assert_eq!(r.u8(), Err(Damage::short()));
        assert!(r.is_empty());
        let max = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
        assert_eq!(Reader::new(&max).uvarint(), Ok(u64::MAX));
        assert_eq!(Reader::new(&max).varint(), Ok(i64::MIN));
        assert_eq!(Bits::new(&max).unsigned_bytes(), Ok(u64::MAX));
        assert!(Reader::new(&[0xff; 11]).uvarint().is_err());
        assert!(Bits::new(&[0xff; 11]).unsigned_bytes().is_err());
        assert!(Reader::new(&[5, b'a']).text().is_err());
        assert!(Reader::new(&[1, 0xff]).text().is_err());
        assert!(Reader::at(&[1], 2).is_err());
        assert!(Reader::new(&[255, 255, 255, 255, 255, 255, 255, 255, 255, 1]).text().is_err());
    }

    #[test]
    fn sections() {
        let mut bytes = vec![0, 0, 0, 9];
        bytes.extend(b"123456789");
        bytes.extend(0xe306_9283u32.to_be_bytes());
        assert_eq!(Reader::new(&bytes).section().map(|r| r.rest()), Ok(&b"123456789"[..]));
        bytes[6] ^= 1;
        assert!(Reader::new(&bytes).section().is_err());
        assert!(Reader::new(&[0xff; 12]).section().is_err());
    }

    #[test]
    fn bits() {
        let mut b = Bits::new(&[0b1011_0000, 0b1111_1111, 0x80]);
        assert_eq!((b.bit(), b.bits(3), b.bits(6)), (Ok(true), Ok(0b011), Ok(0b11)));
        assert_eq!((b.ones(4), b.ones(9), b.bits(4), b.bits(4)), (Ok(4), Ok(3), Ok(0), Err(Damage::short())));
        assert_eq!(Bits::new(&[0xff; 8]).bits(64), Ok(u64::MAX));
        assert_eq!(Bits::new(&[0xff; 9]).bits(3).and_then(|_| Bits::new(&[0xff; 9]).bits(64)), Ok(u64::MAX));
        // Three bits: -3 to 4.
        let all: Vec<i64> = (0u8..8).filter_map(|v| Bits::new(&[v << 5]).signed(3).ok()).collect();
        assert_eq!(all, [0, 1, 2, 3, 4, -3, -2, -1]);
        assert_eq!(Bits::new(&[0xff; 8]).signed(64), Ok(-1));
    }
}
