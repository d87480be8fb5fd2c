//! Intents of commands that are under way, a row for each command.
//!
//! As a rule an intent lives no longer than its command: it is put down before (R3), and ends with the
//! answer. Meanwhile nobody asks for it, since nobody else may work on these documents. So those of one
//! command stand in one row, at a third of what a row for each costs. Whatever got no answer goes into
//! [`intents`] before anybody may claim its document: with the verdicts, at the next claim, or at the next
//! start.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use rusqlite::{Connection, params};

use super::intents::{self, Kept};
use super::schema;
use crate::key::Key;
use crate::shared::lock;

/// Numbers of the commands that are under way; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Sent(Arc<Mutex<HashSet<i64>>>);

impl Sent {
    /// Whether any command is under way.
    pub fn any(&self) -> bool {
        !lock(&self.0).is_empty()
    }
}

/// One of them. Once it is let go of, what still stands in its row is anybody's.
#[derive(Debug)]
pub struct Ticket {
    /// The number of its row.
    pub n: i64,
    among: Sent,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(&self.among.0).remove(&self.n);
    }
}

/// Bytes of the checksum in front.
const SUM: usize = 8;

/// Intents as one row keeps them: xxh3 of all the rest, then of each intent the key, `new`, `base_after`,
/// `fields` and `receipt` (length + 1 in four bytes, 0 for none), epoch (eight), side, `after_is_new`.
pub fn pack<'a>(rows: impl Iterator<Item = (&'a Key, &'a Kept)>) -> Vec<u8> {
    let mut out = vec![0; SUM];
    for (key, kept) in rows {
        let parts = [&kept.new, &kept.base_after, &kept.fields, &kept.receipt];
        let parts = parts.map(|part| part.as_deref());
        for part in [Some(key.as_bytes())].into_iter().chain(parts) {
            let len = part.map_or(0, |bytes| bytes.len() + 1);
            let len = u32::try_from(len).expect("a batch is far below 4 GiB");
            out.extend_from_slice(&len.to_le_bytes());
            out.extend_from_slice(part.unwrap_or_default());
        }
        out.extend_from_slice(&kept.epoch.to_le_bytes());
        let side = u8::try_from(kept.side).expect("one of two");
        out.extend_from_slice(&[side, kept.after_is_new.into()]);
    }
    let sum = xxhash_rust::xxh3::xxh3_64(&out[SUM..]);
    out[..SUM].copy_from_slice(&sum.to_le_bytes());
    out
}

/// The reverse of [`pack`]; `None` when the bytes were damaged on disk.
fn unpack(packed: &[u8]) -> Option<Vec<(Key, Kept)>> {
    let (sum, mut rest) = packed.split_first_chunk::<SUM>()?;
    if xxhash_rust::xxh3::xxh3_64(rest).to_le_bytes() != *sum {
        return None;
    }
    let mut all = Vec::new();
    while !rest.is_empty() {
        let mut part = || {
            let (len, after) = rest.split_first_chunk::<4>()?;
            let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
            let (bytes, after) = after.split_at_checked(len.saturating_sub(1))?;
            rest = after;
            Some((len > 0).then(|| bytes.to_vec()))
        };
        let key = Key::from_bytes(&part()??);
        let (new, base_after, fields, receipt) = (part()?, part()?, part()?, part()?);
        let (epoch, after) = rest.split_first_chunk::<8>()?;
        let ([side, after_is_new], after) = after.split_first_chunk::<2>()?;
        rest = after;
        let kept = Kept {
            side: (*side).into(),
            new,
            base_after,
            after_is_new: *after_is_new != 0,
            fields,
            epoch: i64::from_le_bytes(*epoch),
            receipt,
        };
        all.push((key, kept));
    }
    Some(all)
}

/// Puts down the packed intents of a command that is about to be sent.
pub fn put(c: &Connection, among: &Sent, packed: &[u8]) -> rusqlite::Result<Ticket> {
    c.prepare_cached("INSERT INTO sent(intents) VALUES(?)")?
        .execute([packed])?;
    let n = c.last_insert_rowid();
    lock(&among.0).insert(n);
    let among = among.clone();
    Ok(Ticket { n, among })
}

/// The command has its answer, and what is still open of it is in [`intents`].
pub fn answered(c: &Connection, n: i64) -> rusqlite::Result<()> {
    c.prepare_cached("DELETE FROM sent WHERE n = ?")?
        .execute([n])
        .map(drop)
}

/// Puts the intents of commands that are not under way any more, and have no answer, among the others.
pub fn take_apart(c: &Connection, under_way: &Sent) -> rusqlite::Result<()> {
    let over: Vec<i64> = {
        let under_way = lock(&under_way.0);
        let mut numbers = c.prepare_cached("SELECT n FROM sent")?;
        let numbers = numbers.query_map([], |r| r.get(0))?;
        let over = numbers.filter(|n| !matches!(n, Ok(n) if under_way.contains(n)));
        over.collect::<Result<_, _>>()?
    };
    for n in over {
        let packed: Vec<u8> = c
            .prepare_cached("SELECT intents FROM sent WHERE n = ?")?
            .query_row([n], |r| r.get(0))?;
        let Some(all) = unpack(&packed) else {
            return Err(schema::corrupt("intents of a command are damaged".into()));
        };
        let rows: Vec<_> = all.iter().map(|(key, kept)| (key, kept)).collect();
        intents::put_all(c, &rows)?;
        answered(c, n)?;
    }
    Ok(())
}

/// Whether a command with an intent of that key may be under way. Of such a document there is a row in a
/// queue: only then the bytes are searched.
pub(super) fn has(c: &Connection, key: &Key) -> rusqlite::Result<bool> {
    c.prepare_cached(
        "SELECT (EXISTS(SELECT 1 FROM outbox WHERE key = ?1) OR EXISTS(SELECT 1 FROM inbox WHERE key = ?1))
         AND EXISTS(SELECT 1 FROM sent WHERE instr(intents, ?1) > 0)",
    )?
    .query_row(params![key.as_bytes()], |r| r.get(0))
}

#[cfg(test)]
mod tests {
    use bson::doc;

    use super::*;
    use crate::decide::Side;
    use crate::key::Id;
    use crate::store::Store;
    use crate::store::intents::Intent;
    use crate::store::queue::{self, Change};

    fn of(n: i32, text: &str) -> (Key, Intent) {
        let new = doc! {"_id": n, "text": text}.to_vec().unwrap();
        let key = Key::new(1, &Id::of(&new).unwrap());
        let intent = Intent {
            side: if n % 2 == 0 {
                Side::Remote
            } else {
                Side::Local
            },
            new: (n > 0).then(|| new.clone()),
            digest: None,
            base_after: Some(new),
            fields: (n > 1).then(|| vec![b"text".to_vec(), b"more".to_vec()]),
            epoch: 7 << 40,
            receipt: None,
        };
        (key, intent)
    }

    fn some() -> Vec<(Key, Intent)> {
        (0..4).map(|n| of(n, "as it was sent")).collect()
    }

    fn packed() -> Vec<u8> {
        let kept: Vec<_> = some().into_iter().map(|(k, i)| (k, i.kept(None))).collect();
        pack(kept.iter().map(|(key, kept)| (key, kept)))
    }

    fn found(c: &Connection) -> rusqlite::Result<Vec<Option<Intent>>> {
        let keys = some().into_iter().map(|(key, _)| key);
        keys.map(|key| intents::get(c, &key)).collect()
    }

    #[tokio::test]
    async fn r3_intents_of_a_command_outlive_it_and_the_process() {
        let wanted: Vec<_> = some().into_iter().map(|(_, intent)| Some(intent)).collect();
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let sent = store.sent().clone();
        let change = |(key, _): (Key, Intent)| Change {
            key,
            id: Id::of(&doc! {"_id": 1}.to_vec().unwrap()).unwrap(),
            hint: None,
        };
        let changes: Vec<_> = some().into_iter().take(3).map(change).collect();
        let putting = store.call(move |c| {
            queue::enqueue(c, Side::Local, &changes, 5)?;
            put(c, &sent, &packed())
        });
        let ticket = putting.await.unwrap();
        // WHILE it is under way they stay together, and are known
        let sent = store.sent().clone();
        let asking = store.call(move |c| {
            take_apart(c, &sent)?;
            let open = |n| intents::is_open(c, &of(n, "").0);
            Ok((found(c)?, open(1)?, open(3)?, open(4)?))
        });
        let none_yet = vec![None; wanted.len()];
        assert_eq!(
            asking.await.unwrap(),
            (none_yet, true, false, false),
            "3 has no row in a queue"
        );
        // WHEN it ends without an answer THEN they are as if each had been put by itself
        let sent = store.sent().clone();
        drop(ticket);
        let asking = store.call(move |c| {
            take_apart(c, &sent)?;
            let left = c.query_row("SELECT count(*) FROM sent", [], |r| r.get::<_, i64>(0))?;
            Ok((found(c)?, left))
        });
        assert_eq!(asking.await.unwrap(), (wanted.clone(), 0));
        // AND so they are when the process ends meanwhile
        let sent = store.sent().clone();
        let putting = store.call(move |c| {
            c.execute("DELETE FROM intents", [])?;
            put(c, &sent, &packed())
        });
        let ticket = putting.await.unwrap();
        drop(store);
        let store = crate::store::tests::reopen(dir.path());
        assert_eq!(store.call(found).await.unwrap(), wanted);
        drop(ticket);
    }

    #[test]
    fn damage_is_noticed_and_puts_the_file_aside() {
        let whole = packed();
        assert_eq!(unpack(&whole).unwrap().len(), 4);
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 4;
            assert!(unpack(&damaged).is_none(), "byte {at}");
            assert!(unpack(&whole[..at]).is_none(), "cut at {at}");
        }
        let dir = tempfile::tempdir().unwrap();
        drop(Store::open(dir.path()).unwrap());
        let c = Connection::open(dir.path().join("sangam.db")).unwrap();
        c.execute("INSERT INTO sent(intents) VALUES(x'00')", [])
            .unwrap();
        drop(c);
        let store = crate::store::tests::reopen(dir.path());
        assert!(store.put_aside().is_some());
    }
}
