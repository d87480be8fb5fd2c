//! The exact comparison of a range: both sides are read whole, at the same time.
//!
//! Documents are joined as they come: what has come from one side alone waits for the other one's.
//! Equal sides keep in step, so little waits; where it becomes much, only a digest of the content is
//! kept. A range that the local side has nothing of is read by `_id` alone: what is new there crosses the
//! link once, when it is fetched.

use std::collections::HashMap;

use tokio::sync::mpsc;

use super::{Count, Difference, Finds, Found, Out, Place, Range, Seen};
use crate::content::strip;
use crate::decide::Side;
use crate::failure::Failure;
use crate::key::{Id, Key};
use crate::side::Rows;
use crate::store::base::digest;

/// Bytes of contents that wait for the other side, from which on digests are kept instead.
const WAITING: usize = 4 << 20;

/// Documents on their way from a cursor to the join.
const STEP: usize = 128;

/// And their bytes, so that large ones go one by one.
const STEP_BYTES: usize = 256 << 10;

/// A content that waits, or what tells it from others.
enum Held {
    Content(Vec<u8>),
    Digest([u8; 32]),
}

type Step = Vec<(Key, Vec<u8>)>;

impl Place {
    /// Compares a range byte for byte; see the module's text. What is found goes to `finds`.
    pub async fn exact(&self, range: &Range, finds: &Finds) -> Result<Count, Failure> {
        let mut out = Out::new(finds);
        let mut local = self.scan(&self.local, range, false).await?;
        let Some(first) = local.next().await? else {
            return self.only_remote(range, out).await;
        };
        let remote = self.scan(&self.remote, range, false).await?;
        let (here, mut from_local) = mpsc::channel(1);
        let (there, mut from_remote) = mpsc::channel(1);
        let mut join = Join::default();
        // It owns the receivers: should it fail, nobody waits to send.
        let (into, to) = (&mut join, &mut out);
        let joined = async move {
            let (mut here_open, mut there_open) = (true, true);
            while here_open || there_open {
                // The side that is behind, if one is: so the other one waits on the wire, not here.
                let turn = into.behind();
                let here = here_open && !(there_open && turn == Some(Side::Remote));
                let there = there_open && !(here_open && turn == Some(Side::Local));
                let (side, step) = tokio::select! {
                    step = from_local.recv(), if here => (Side::Local, step),
                    step = from_remote.recv(), if there => (Side::Remote, step),
                };
                match (side, step) {
                    (Side::Local, None) => here_open = false,
                    (Side::Remote, None) => there_open = false,
                    (side, Some(step)) => into.take(side, step, to).await?,
                }
            }
            Ok::<_, Failure>(())
        };
        let (local, remote, ()) = tokio::try_join!(
            self.feed(Some(first.into_bytes()), local, here),
            self.feed(None, remote, there),
            joined
        )?;
        let mut count = join.finish(&mut out).await?;
        out.flush().await?;
        count.bytes = local + remote;
        Ok(count)
    }

    /// Sends the documents of a cursor to the join; their bytes.
    async fn feed(
        &self,
        first: Option<Vec<u8>>,
        mut rows: Rows,
        to: mpsc::Sender<Step>,
    ) -> Result<u64, Failure> {
        let (mut bytes, mut in_step) = (0, 0);
        let mut step = Vec::with_capacity(STEP);
        let mut next = first;
        loop {
            let body = match next.take() {
                Some(body) => body,
                None => match rows.next().await? {
                    Some(d) => d.into_bytes(),
                    None => break,
                },
            };
            bytes += body.len() as u64;
            // Every stored document has an `_id`.
            let Some(id) = Id::of(&body) else { continue };
            let key = Key::new(self.ns, &id);
            let content = match strip(&body, &self.sync_fields) {
                std::borrow::Cow::Owned(content) => content,
                std::borrow::Cow::Borrowed(_) => body,
            };
            in_step += content.len();
            step.push((key, content));
            if step.len() == STEP || in_step > STEP_BYTES {
                in_step = 0;
                let full = std::mem::replace(&mut step, Vec::with_capacity(STEP));
                if to.send(full).await.is_err() {
                    return Ok(bytes);
                }
            }
        }
        // The join is gone only if it failed, and says why.
        let _ = to.send(step).await;
        Ok(bytes)
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
            out.push(Found::Differs(difference)).await?;
        }
        out.flush().await?;
        Ok(count)
    }
}

/// What has come from one side alone so far.
#[derive(Default)]
struct Join {
    /// By side: local, remote.
    waiting: [HashMap<Key, (Id, Held)>; 2],
    /// Bytes of the contents among them.
    bytes: usize,
    documents: u64,
}

impl Join {
    /// The side that more is to be read from.
    fn behind(&self) -> Option<Side> {
        let [local, remote] = [self.waiting[0].len(), self.waiting[1].len()];
        if local > remote + 2 * STEP {
            Some(Side::Remote)
        } else if remote > local + 2 * STEP {
            Some(Side::Local)
        } else {
            None
        }
    }

    async fn take(&mut self, side: Side, step: Step, out: &mut Out<'_>) -> Result<(), Failure> {
        for (key, content) in step {
            let Some((id, other)) = self.waiting[side.other() as usize].remove(&key) else {
                self.hold(side, key, content);
                continue;
            };
            self.documents += 1;
            let equal = match &other {
                Held::Content(there) => {
                    self.bytes -= there.len();
                    *there == content
                }
                Held::Digest(there) => digest(&content) == *there,
            };
            if equal {
                out.push(Found::Equal(key, content)).await?;
                continue;
            }
            let other = match other {
                Held::Content(there) => Seen::Content(there),
                Held::Digest(_) => Seen::Unread,
            };
            out.push(differs(key, id, side, Seen::Content(content), other))
                .await?;
        }
        Ok(())
    }

    fn hold(&mut self, side: Side, key: Key, content: Vec<u8>) {
        let Some(id) = Id::of(&content) else { return };
        let held = if self.bytes + content.len() > WAITING {
            Held::Digest(digest(&content))
        } else {
            self.bytes += content.len();
            Held::Content(content)
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
                out.push(differs(key, id, side, seen, Seen::Absent)).await?;
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
