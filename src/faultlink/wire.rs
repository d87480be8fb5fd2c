//! As much of MongoDB's wire protocol as is needed to find one command and its reply.

use std::io::Read;

/// Bytes of a message's header.
pub(super) const HEADER: usize = 16;
/// How much of a request is looked at to find its command: a compressor's first block is up to 128 KiB.
pub(super) const HEAD: usize = 160 * 1024;
/// The server takes no larger message.
const MAX_MESSAGE: usize = 48_000_000 + 64 * 1024;

const OP_REPLY: i32 = 1;
const OP_QUERY: i32 = 2004;
const OP_COMPRESSED: i32 = 2012;
const OP_MSG: i32 = 2013;
const ZSTD: u8 = 3;

/// Header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes of the whole message, header included.
    pub(super) length: usize,
    pub(super) request_id: i32,
    pub(super) response_to: i32,
    opcode: i32,
}

impl Header {
    /// Reads the header at the beginning of `bytes`; `None` if this is no such message.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let header = Self {
            length: usize::try_from(int(bytes, 0)?).ok()?,
            request_id: int(bytes, 4)?,
            response_to: int(bytes, 8)?,
            opcode: int(bytes, 12)?,
        };
        let known = matches!(header.opcode, OP_REPLY | OP_QUERY | OP_COMPRESSED | OP_MSG);
        (known && (HEADER..=MAX_MESSAGE).contains(&header.length)).then_some(header)
    }
}

/// Name of the command in the request that begins `bytes`; `None` if it can't be told.
pub(super) fn command_name(bytes: &[u8]) -> Option<String> {
    let header = Header::read(bytes)?;
    match header.opcode {
        OP_MSG => in_message(bytes.get(HEADER..)?),
        OP_COMPRESSED if int(bytes, HEADER)? == OP_MSG && *bytes.get(HEADER + 8)? == ZSTD => {
            let mut decoder = zstd::stream::read::Decoder::new(bytes.get(HEADER + 9..)?).ok()?;
            let mut start = vec![0; 4096];
            let mut filled = 0;
            // The tail may be missing here, so an error only ends what we can see.
            while let Ok(n @ 1..) = decoder.read(&mut start[filled..]) {
                filled += n;
            }
            in_message(&start[..filled])
        }
        _ => None,
    }
}

/// The first field's name of the body section in an `OP_MSG` without its header.
fn in_message(message: &[u8]) -> Option<String> {
    let mut at = 4;
    // Document sequences (kind 1) may stand before the body (kind 0).
    while *message.get(at)? == 1 {
        at += 1 + usize::try_from(int(message, at + 1)?).ok()?;
    }
    let name = message.get(at + 1 + 4 + 1..)?;
    let end = name.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(&name[..end]).into_owned())
}

fn int(bytes: &[u8], at: usize) -> Option<i32> {
    let four = bytes.get(at..at + 4)?;
    Some(i32::from_le_bytes(four.try_into().ok()?))
}
