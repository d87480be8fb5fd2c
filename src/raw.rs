//! BSON as bytes: walking the top-level elements of a document and writing commands.
//!
//! Documents are carried byte for byte (R14): duplicate keys, names that are no UTF-8 and NaN
//! payloads survive because nothing here decodes a value. The `bson` crate's raw iterator yields
//! values, not the bytes they came from, so the few lines of walking are our own.

/// The bytes are not a BSON document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed BSON at byte {0}")]
pub struct Malformed(pub usize);

/// One top-level element of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Element<'a> {
    /// BSON type byte.
    pub kind: u8,
    /// Field name without the terminator; may be no UTF-8.
    pub name: &'a [u8],
    /// The value's bytes.
    pub value: &'a [u8],
    /// Type byte, name, terminator and value.
    pub whole: &'a [u8],
}

/// BSON type byte of an embedded document.
pub const DOCUMENT: u8 = 0x03;
/// BSON type byte of an array.
pub const ARRAY: u8 = 0x04;

fn i32_at(bytes: &[u8], at: usize) -> Result<usize, Malformed> {
    let four: [u8; 4] = bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .ok_or(Malformed(at))?;
    usize::try_from(i32::from_le_bytes(four)).map_err(|_| Malformed(at))
}

fn cstring_len(bytes: &[u8], at: usize) -> Result<usize, Malformed> {
    bytes
        .get(at..)
        .and_then(|b| b.iter().position(|b| *b == 0))
        .map(|n| n + 1)
        .ok_or(Malformed(at))
}

fn value_len(kind: u8, bytes: &[u8], at: usize) -> Result<usize, Malformed> {
    Ok(match kind {
        0x06 | 0x0A | 0x7F | 0xFF => 0,
        0x08 => 1,
        0x10 => 4,
        0x01 | 0x09 | 0x11 | 0x12 => 8,
        0x07 => 12,
        0x13 => 16,
        0x02 | 0x0D | 0x0E => 4 + i32_at(bytes, at)?,
        0x03 | 0x04 | 0x0F => i32_at(bytes, at)?,
        0x05 => 5 + i32_at(bytes, at)?,
        0x0B => {
            let first = cstring_len(bytes, at)?;
            first + cstring_len(bytes, at + first)?
        }
        0x0C => 16 + i32_at(bytes, at)?,
        _ => return Err(Malformed(at)),
    })
}

/// Top-level elements of a document, in order. Ends after the first malformed one.
pub fn elements(doc: &[u8]) -> Elements<'_> {
    elements_from(doc, 4)
}

/// The same from the element that begins at byte `at`.
pub fn elements_from(doc: &[u8], at: usize) -> Elements<'_> {
    Elements {
        doc,
        at,
        done: false,
    }
}

/// See [`elements`].
pub struct Elements<'a> {
    doc: &'a [u8],
    at: usize,
    done: bool,
}

impl<'a> Iterator for Elements<'a> {
    type Item = Result<Element<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let at = self.at;
        let parse = || -> Result<Option<Element<'a>>, Malformed> {
            let kind = *self.doc.get(at).ok_or(Malformed(at))?;
            if kind == 0 {
                return if at + 1 == self.doc.len() {
                    Ok(None)
                } else {
                    Err(Malformed(at))
                };
            }
            let name_len = cstring_len(self.doc, at + 1)?;
            let start = at + 1 + name_len;
            let end = start + value_len(kind, self.doc, start)?;
            // The terminator of the document must still follow.
            if end >= self.doc.len() {
                return Err(Malformed(start));
            }
            Ok(Some(Element {
                kind,
                name: &self.doc[at + 1..start - 1],
                value: &self.doc[start..end],
                whole: &self.doc[at..end],
            }))
        };
        match parse() {
            Ok(Some(element)) => {
                self.at = at + element.whole.len();
                Some(Ok(element))
            }
            Ok(None) => {
                self.done = true;
                None
            }
            Err(error) => {
                self.done = true;
                Some(Err(error))
            }
        }
    }
}

/// The first top-level element of that name.
pub fn get<'a>(doc: &'a [u8], name: &[u8]) -> Option<Element<'a>> {
    elements(doc).map_while(Result::ok).find(|e| e.name == name)
}

/// A string value's text.
pub fn text<'a>(e: &Element<'a>) -> Option<&'a str> {
    (e.kind == 0x02)
        .then(|| std::str::from_utf8(e.value.get(4..e.value.len() - 1)?).ok())
        .flatten()
}

/// A document being written. Nested documents are opened and closed in order.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    open: Vec<usize>,
}

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

impl Writer {
    /// An empty document.
    pub fn new() -> Self {
        Self {
            bytes: vec![0; 4],
            open: vec![0],
        }
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written yet.
    pub fn is_empty(&self) -> bool {
        self.bytes.len() == 4
    }

    fn head(&mut self, kind: u8, name: &[u8]) {
        self.bytes.push(kind);
        self.bytes.extend_from_slice(name);
        self.bytes.push(0);
    }

    /// Any element by its type byte and value bytes.
    pub fn value(&mut self, name: impl AsRef<[u8]>, kind: u8, value: &[u8]) -> &mut Self {
        self.head(kind, name.as_ref());
        self.bytes.extend_from_slice(value);
        self
    }

    /// An element as it stands in another document.
    pub fn whole(&mut self, element: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(element);
        self
    }

    /// A string.
    pub fn str(&mut self, name: impl AsRef<[u8]>, value: &str) -> &mut Self {
        self.bytes_str(name, value.as_bytes())
    }

    /// A string from bytes that came out of a document (a field name with `$` before it, say).
    pub fn bytes_str(&mut self, name: impl AsRef<[u8]>, value: &[u8]) -> &mut Self {
        self.head(0x02, name.as_ref());
        let len = i32::try_from(value.len() + 1).expect("a string is shorter than a document");
        self.bytes.extend_from_slice(&len.to_le_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.push(0);
        self
    }

    /// A 32-bit integer.
    pub fn i32(&mut self, name: impl AsRef<[u8]>, value: i32) -> &mut Self {
        self.value(name, 0x10, &value.to_le_bytes())
    }

    /// A boolean.
    pub fn bool(&mut self, name: impl AsRef<[u8]>, value: bool) -> &mut Self {
        self.value(name, 0x08, &[u8::from(value)])
    }

    /// A UTC datetime in milliseconds since 1970.
    pub fn date(&mut self, name: impl AsRef<[u8]>, millis: i64) -> &mut Self {
        self.value(name, 0x09, &millis.to_le_bytes())
    }

    /// A timestamp of the oplog.
    pub fn timestamp(&mut self, name: impl AsRef<[u8]>, time: bson::Timestamp) -> &mut Self {
        let (increment, time) = (time.increment.to_le_bytes(), time.time.to_le_bytes());
        self.value(name, 0x11, &[increment, time].concat())
    }

    /// An embedded document given whole.
    pub fn doc(&mut self, name: impl AsRef<[u8]>, doc: &[u8]) -> &mut Self {
        self.value(name, DOCUMENT, doc)
    }

    /// Opens an embedded document.
    pub fn open(&mut self, name: impl AsRef<[u8]>) -> &mut Self {
        self.open_as(DOCUMENT, name)
    }

    /// Opens an array; its elements' names are the caller's business (`"0"`, `"1"`, …).
    pub fn open_array(&mut self, name: impl AsRef<[u8]>) -> &mut Self {
        self.open_as(ARRAY, name)
    }

    fn open_as(&mut self, kind: u8, name: impl AsRef<[u8]>) -> &mut Self {
        self.head(kind, name.as_ref());
        self.open.push(self.bytes.len());
        self.bytes.extend_from_slice(&[0; 4]);
        self
    }

    /// Closes the innermost open document or array.
    pub fn close(&mut self) -> &mut Self {
        let start = self.open.pop().expect("close matches an open");
        self.bytes.push(0);
        let len =
            i32::try_from(self.bytes.len() - start).expect("commands are kept far below 2 GiB");
        self.bytes[start..start + 4].copy_from_slice(&len.to_le_bytes());
        self
    }

    /// The finished bytes; whatever is still open is closed.
    pub fn finish(mut self) -> Vec<u8> {
        while !self.open.is_empty() {
            self.close();
        }
        self.bytes
    }

    /// The finished command for the driver.
    pub fn command(self) -> bson::RawDocumentBuf {
        bson::RawDocumentBuf::from_bytes(self.finish()).expect("the writer closes what it opens")
    }
}

/// Decimal names of array elements, made once.
pub fn index_name(i: usize) -> String {
    i.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::{doc, rawdoc};

    #[test]
    fn walks_and_rebuilds_every_kind() {
        let d = doc! {"a": 1, "b": "x", "c": {"d": [1, 2.5]}, "e": bson::Bson::Null, "f": bson::oid::ObjectId::new(),
        "g": bson::Regex{pattern: bson::cstr!("^a").into(), options: bson::cstr!("i").into()}, "h": bson::Timestamp{time:0,increment:0},
        "i": bson::Binary{subtype: bson::spec::BinarySubtype::Generic, bytes: vec![1,2,3]}, "j": true, "k": 3_i64,
        "l": bson::Bson::MinKey, "m": bson::DateTime::now(), "": "empty", "$x.y": 1};
        let raw = d.to_vec().unwrap();
        let mut w = Writer::new();
        for e in elements(&raw) {
            w.whole(e.unwrap().whole);
        }
        assert_eq!(w.finish(), raw);
    }

    #[test]
    fn writer_agrees_with_the_crate() {
        let mut w = Writer::new();
        w.str("a", "x")
            .open("b")
            .i32("c", 1)
            .open_array("d")
            .bool("0", true)
            .close()
            .close()
            .date("t", 5);
        let want =
            rawdoc! {"a": "x", "b": {"c": 1, "d": [true]}, "t": bson::DateTime::from_millis(5)};
        assert_eq!(w.finish(), want.as_bytes());
    }

    #[test]
    fn cut_bytes_are_refused() {
        let raw = rawdoc! {"a": "hello", "b": 2}.into_bytes();
        for cut in 5..raw.len() {
            assert!(elements(&raw[..cut]).any(|e| e.is_err()), "cut at {cut}");
        }
    }
}
