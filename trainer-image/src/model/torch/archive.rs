//! The zip file in which torch keeps a pickle and, each in an entry of its own, the bytes of tensors. Its entries are stored as
//! they are, so that they can be used where they lie; one that is packed is refused.
//!
//! Every number of the file is checked before anything is done with it. (APPNOTE.TXT of PKWARE, sections 4.3 and 4.5.3.)

use std::collections::HashMap;
use std::ops::Range;

const END: &[u8] = b"PK\x05\x06";
const END_64: &[u8] = b"PK\x06\x06";
const LOCATOR_64: &[u8] = b"PK\x06\x07";
const ENTRY: &[u8] = b"PK\x01\x02";
const LOCAL: &[u8] = b"PK\x03\x04";

const END_BYTES: usize = 22;
const LOCATOR_BYTES: usize = 20;
/// The longest comment after the end of the directory.
const COMMENT_BYTES: usize = 65_535;
/// The extra field with numbers that need 64 bits.
const EXTRA_64: u64 = 1;

type Result<T> = std::result::Result<T, String>;

/// Where in a file its entries lie, by name.
pub(super) fn entries(file: &[u8]) -> Result<HashMap<String, Range<usize>>> {
    let (mut at, count) = directory(file)?;
    let mut entries = HashMap::new();
    for _ in 0..count {
        let entry = Entry::read(file, at)?;
        at = entry.end;
        let place = entry.place(file)?;
        if let Some(twice) = entries.insert(entry.name, place).map(|_| at) {
            return Err(format!("the directory has a name twice, before byte {twice}"));
        }
    }
    Ok(entries)
}

/// Where the directory begins, and how many entries it has.
fn directory(file: &[u8]) -> Result<(usize, u64)> {
    let first = file.len().saturating_sub(END_BYTES + COMMENT_BYTES);
    let tail = file.get(first..).unwrap_or_default();
    let end = tail.windows(END.len()).rposition(|window| window == END).map(|at| first + at);
    let end = end.ok_or("it has no directory at its end: it is cut, or no zip file")?;
    let (count, offset) = (number::<2>(file, end, 10)?, number::<4>(file, end, 16)?);
    if count < 0xffff && offset < 0xffff_ffff {
        return Ok((to_usize(offset)?, count));
    }
    let locator = end.checked_sub(LOCATOR_BYTES).ok_or("its directory says 64 bits, and has no place for them")?;
    signed(file, locator, LOCATOR_64)?;
    let end = to_usize(number::<8>(file, locator, 8)?)?;
    signed(file, end, END_64)?;
    Ok((to_usize(number::<8>(file, end, 48)?)?, number::<8>(file, end, 32)?))
}

/// An entry of the directory.
struct Entry {
    name: String,
    /// Where the entry's own header is, before its bytes.
    local: usize,
    bytes: usize,
    /// Where the next one begins.
    end: usize,
}

impl Entry {
    fn read(file: &[u8], at: usize) -> Result<Self> {
        signed(file, at, ENTRY)?;
        let field = |offset| number::<2>(file, at, offset);
        let wide = |offset| number::<4>(file, at, offset);
        let (name_len, extra_len, comment_len) = (field(28)? as usize, field(30)? as usize, field(32)? as usize);
        let name = String::from_utf8_lossy(slice(file, at + 46, name_len)?).into_owned();
        if field(8)? & 1 == 1 || field(10)? != 0 {
            return Err(format!("the entry '{name}' is packed or encrypted, which torch never writes"));
        }
        let extra = slice(file, at + 46 + name_len, extra_len)?;
        let (mut packed, mut bytes, mut local) = (wide(20)?, wide(24)?, wide(42)?);
        let mut extended = extra_64(extra);
        for number in [&mut bytes, &mut packed, &mut local] {
            if *number == 0xffff_ffff {
                *number = extended.next().ok_or_else(|| format!("the entry '{name}' lacks its 64-bit numbers"))?;
            }
        }
        if packed != bytes {
            return Err(format!("the entry '{name}' has two sizes, {packed} and {bytes} bytes"));
        }
        let end = at + 46 + name_len + extra_len + comment_len;
        Ok(Self { name, local: to_usize(local)?, bytes: to_usize(bytes)?, end })
    }

    /// Where its bytes lie.
    fn place(&self, file: &[u8]) -> Result<Range<usize>> {
        signed(file, self.local, LOCAL)?;
        let skipped = 30 + number::<2>(file, self.local, 26)? + number::<2>(file, self.local, 28)?;
        let start = self.local + to_usize(skipped)?;
        slice(file, start, self.bytes).map_err(|e| format!("the entry '{}': {e}", self.name))?;
        Ok(start..start + self.bytes)
    }
}

/// The 64-bit numbers of an entry that has some.
fn extra_64(mut extra: &[u8]) -> impl Iterator<Item = u64> {
    let mut found: &[u8] = &[];
    while let (Ok(id), Ok(size)) = (number::<2>(extra, 0, 0), number::<2>(extra, 0, 2)) {
        let Ok(field) = slice(extra, 4, size as usize) else { break };
        if id == EXTRA_64 {
            found = field;
            break;
        }
        extra = &extra[4 + field.len()..];
    }
    found.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes))
}

fn signed(file: &[u8], at: usize, signature: &[u8]) -> Result<()> {
    match slice(file, at, signature.len())? == signature {
        true => Ok(()),
        false => Err(format!("at byte {at} there is not what its directory says: it is damaged")),
    }
}

/// The number of so many bytes at an offset behind `at`.
fn number<const BYTES: usize>(file: &[u8], at: usize, offset: usize) -> Result<u64> {
    let at = at.checked_add(offset).ok_or("a place beyond every file")?;
    let mut bytes = [0; 8];
    bytes[..BYTES].copy_from_slice(slice(file, at, BYTES)?);
    Ok(u64::from_le_bytes(bytes))
}

fn slice(file: &[u8], at: usize, len: usize) -> Result<&[u8]> {
    let range = at.checked_add(len).and_then(|end| file.get(at..end));
    range.ok_or_else(|| format!("it should have {len} bytes at byte {at} and ends at {}", file.len()))
}

fn to_usize(number: u64) -> Result<usize> {
    usize::try_from(number).map_err(|_| format!("a number of {number} is beyond every file"))
}
