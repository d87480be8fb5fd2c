//! The exact comparison of a range: both sides are read whole, at the same time.
//!
//! Both sides come in the order of their `_id` index, so equal documents mostly come together, and are
//! compared where they stand in the servers' answers. Where an order differs (by another collation, say)
//! or a document is on one side only, what has come from one side waits for the other one's, by its key;
//! where it becomes much, only a digest of the content is kept. A range that the local side has nothing of
//! is read by `_id` alone: what is new there crosses the link once, when it is fetched.

use std::borrow::Cow;

use bytes::Bytes;

use super::{Count, Difference, Finds, Found, Out, Place, Range, Seen};
use crate::content::strip;
use crate::decide::Side;
use crate::failure::Failure;
use crate::key::{Id, Key, KeyMap};
use crate::side::{Answer, Rows};
use crate::store::base::digest;

/// Bytes of contents that wait for the other side, from which on digests are kept instead.
const WAITING: usize = 4 << 20;

/// A content that waits, or what tells it from others.
enum Held {
    Content(Vec<u8>),
    Digest([u8; 32]),
}

impl Place {
    /// Compares a range byte for byte; see the module's text. What is found goes to `finds`.
    pub async fn exact(&self, range: &Range, finds: &Finds) -> Result<Count, Failure> {
        let mut out = Out::new(finds);
        let mut local = Reader::new(self.scan(&self.local, range, false).await?);
        local.fill().await?;
        if local.head.is_none() {
            return self.only_remote(range, out).await;
        }
        let mut remote = Reader::new(self.scan(&self.remote, range, false).await?);
        let mut join = Join {
            ns: self.ns,
            sync_fields: &self.sync_fields,
            waiting: Default::default(),
            bytes: 0,
            documents: 0,
        };
        loop {
            if local.head.is_none() || remote.head.is_none() {
                tokio::try_join!(local.fill(), remote.fill())?;
                if local.head.is_none() && remote.head.is_none() {
                    break;
                }
            }
            join.step(&mut local.head, &mut remote.head, &mut out);
            out.flush_if_full().await?;
        }
        let mut count = join.finish(&mut out).await?;
        out.flush().await?;
        count.bytes = local.bytes + remote.bytes;
        Ok(count)
    }

    /// A range of which the local side has nothing.
    async fn only_remote(&self, range: &Range, mut out: Out<'_>) -> Result<Count, Failure> {
        let mut count = Count::default();
        let mut rows = self.scan(&self.remote, range, true).await?;
        while let Some(d) = rows.next().await? {
            count.bytes += d.as_bytes().len() as u64;
            let Some(id) = Id::of(d.as_bytes()) else {
                continue;
            };
            count.documents += 1;
            let difference = Difference {
                key: Key::new(self.ns, &id),
                id,
                local: Seen::Absent,
                remote: Seen::Unread,
            };
            out.push(Found::Differs(difference));
            out.flush_if_full().await?;
        }
        out.flush().await?;
        Ok(count)
    }
}

/// One side of a range, document by document.
struct Reader {
    rows: Rows,
    answer: Answer,
    /// The next document, unless there are no more.
    head: Option<Bytes>,
    ended: bool,
    /// Of the documents so far.
    bytes: u64,
}

impl Reader {
    fn new(rows: Rows) -> Self {
        Self {
            rows,
            answer: Answer::default(),
            head: None,
            ended: false,
            bytes: 0,
        }
    }

    /// Sees to it that there is a next document, if there are more.
    async fn fill(&mut self) -> Result<(), Failure> {
        while self.head.is_none() && !self.ended {
            if let Some(document) = self.answer.next() {
                let document = document?;
                self.bytes += document.len() as u64;
                self.head = Some(document);
            } else if let Some(answer) = self.rows.answer().await? {
                self.answer = answer;
            } else {
                self.ended = true;
            }
        }
        Ok(())
    }
}

/// The two sides of a range as they are joined.
struct Join<'a> {
    ns: u32,
    sync_fields: &'a [String],
    /// What has come from one side alone so far; by side: local, remote.
    waiting: [KeyMap<(Id, Held)>; 2],
    /// Bytes of the contents among them.
    bytes: usize,
    documents: u64,
}

impl Join<'_> {
    /// Takes one of the two documents that come next, or both; `None` where a side has no more.
    fn step(&mut self, local: &mut Option<Bytes>, remote: &mut Option<Bytes>, out: &mut Out<'_>) {
        if let (Some(here), Some(there)) = (&*local, &*remote)
            && here == there
            && let Some(key) = Key::of(self.ns, here)
        {
            let equal = here.clone();
            (*local, *remote) = (None, None);
            self.documents += 1;
            out.push(Found::Equal(key, self.content(equal)));
            return;
        }
        let key = |d: &Option<Bytes>| d.as_deref().and_then(|d| Key::of(self.ns, d));
        let [here, there] = [key(local), key(remote)];
        // A side that is behind catches up first: then both are in step again.
        if let Some(key) = here.clone().filter(|k| self.waits(Side::Remote, k)) {
            self.take(Side::Local, key, local.take(), out);
        } else if let Some(key) = there.clone().filter(|k| self.waits(Side::Local, k)) {
            self.take(Side::Remote, key, remote.take(), out);
        } else {
            for (side, key, head) in [(Side::Local, here, local), (Side::Remote, there, remote)] {
                let head = head.take();
                // Every stored document has an `_id`.
                if let Some(key) = key {
                    self.take(side, key, head, out);
                }
            }
        }
    }

    /// What counts of a document.
    fn content(&self, document: Bytes) -> Bytes {
        match strip(&document, self.sync_fields) {
            Cow::Owned(content) => content.into(),
            Cow::Borrowed(_) => document,
        }
    }

    fn waits(&self, side: Side, key: &Key) -> bool {
        self.waiting[side as usize].contains_key(key)
    }

    /// Joins a document of a side with what waits for it, or lets it wait.
    fn take(&mut self, side: Side, key: Key, document: Option<Bytes>, out: &mut Out<'_>) {
        let Some(content) = document.map(|d| self.content(d)) else {
            return;
        };
        let Some((id, other)) = self.waiting[side.other() as usize].remove(&key) else {
            self.hold(side, key, &content);
            return;
        };
        self.documents += 1;
        let equal = match &other {
            Held::Content(there) => {
                self.bytes -= there.len();
                *there == content
            }
            Held::Digest(there) => digest(&content) == *there,
        };
        out.push(if equal {
            Found::Equal(key, content)
        } else {
            let other = match other {
                Held::Content(there) => Seen::Content(there),
                Held::Digest(_) => Seen::Unread,
            };
            differs(key, id, side, Seen::Content(content.into()), other)
        });
    }

    fn hold(&mut self, side: Side, key: Key, content: &[u8]) {
        let Some(id) = Id::of(content) else { return };
        // A copy: a part of an answer would keep all of it in memory.
        let held = if self.bytes + content.len() > WAITING {
            Held::Digest(digest(content))
        } else {
            self.bytes += content.len();
            Held::Content(content.to_vec())
        };
        self.waiting[side as usize].insert(key, (id, held));
    }

    /// What is left has come from one side only.
    async fn finish(mut self, out: &mut Out<'_>) -> Result<Count, Failure> {
        for side in [Side::Local, Side::Remote] {
            for (key, (id, held)) in std::mem::take(&mut self.waiting[side as usize]) {
                self.documents += 1;
                let seen = match held {
                    Held::Content(content) => Seen::Content(content),
                    Held::Digest(_) => Seen::Unread,
                };
                out.push(differs(key, id, side, seen, Seen::Absent));
                out.flush_if_full().await?;
            }
        }
        Ok(Count {
            documents: self.documents,
            ..Count::default()
        })
    }
}

fn differs(key: Key, id: Id, side: Side, seen: Seen, other: Seen) -> Found {
    let (local, remote) = match side {
        Side::Local => (seen, other),
        Side::Remote => (other, seen),
    };
    Found::Differs(Difference {
        key,
        id,
        local,
        remote,
    })
}
