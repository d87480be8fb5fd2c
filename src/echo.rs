//! Echoes: the events of our own writes, told apart before they reach a queue.
//!
//! A write that a side acknowledged comes back on that side's stream as an event. It tells nothing new,
//! but it would cost a row in the queue and a look at what is known of the document, or at both sides. Here
//! each stream owes one event for each create, an insert, and one for each write by fields, an update
//! of just these fields to just these values. The first such event that arrives is that debt, or an
//! older one of somebody else's: whatever makes the document differ from base later has a later event.
//!
//! The event may arrive before the acknowledgement. If the write then fails, somebody else wrote the
//! same, and the caller must queue the document. All of this is in memory: after a crash, events that
//! nobody expects are looked at, and writes without an answer have their intents.

use std::sync::Mutex;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::decide::Side;
use crate::guard::{Form, Write};
use crate::key::{Key, KeyMap};
use crate::raw::{self, Element};
use crate::shared::lock;

/// Most writes whose event is waited for, a side; beyond it they are looked at instead.
const MOST: usize = 100_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// On its way, no answer and no event yet.
    Sent,
    /// The event was there before the answer.
    Seen,
    /// Acknowledged; the event is owed.
    Owed,
}

/// What an event says that may be an echo.
#[derive(Clone, Copy, Debug)]
pub enum News<'a> {
    /// The document was inserted.
    Inserted,
    /// It was updated; the event's `updateDescription`.
    Updated(&'a [u8]),
    /// Anything else.
    Other,
}

/// What the event of a write will say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Inserted,
    /// Fields and values, as [`Echoes::fields`] makes it.
    Updated(u64),
}

/// Whether the event of a write of that form is known beforehand.
pub fn is_known(form: &Form) -> bool {
    matches!(form, Form::Insert | Form::Fields(_))
}

/// Writes of ours whose event may still come, by side.
#[derive(Debug)]
pub struct Echoes {
    debts: [Mutex<KeyMap<(Stage, Said)>>; 2],
    /// Nobody shall be able to make up an event that is taken for one of ours.
    seed: u64,
}

impl Default for Echoes {
    fn default() -> Self {
        Self {
            debts: Default::default(),
            seed: rand::random(),
        }
    }
}

impl Echoes {
    /// These writes are about to be sent to a side.
    pub fn sent<'a>(&self, side: Side, writes: impl Iterator<Item = (&'a Write, &'a Form)>) {
        let known = writes.filter_map(|(write, form)| Some((write, self.said(write, form)?)));
        let known: Vec<_> = known.collect();
        let mut all = lock(&self.debts[side as usize]);
        all.reserve(known.len());
        for (write, said) in known {
            if all.len() < MOST {
                all.insert(write.key.clone(), (Stage::Sent, said));
            } else {
                all.remove(&write.key);
            }
        }
    }

    fn said(&self, write: &Write, form: &Form) -> Option<Said> {
        let new = write.new.as_deref()?;
        match form {
            Form::Insert => Some(Said::Inserted),
            Form::Fields(names) => {
                let mut all = 0_u64;
                for name in names {
                    let part = match raw::get(new, name) {
                        Some(e) => self.set(&e),
                        None => self.unset(name),
                    };
                    all = all.wrapping_add(part);
                }
                Some(Said::Updated(all))
            }
            _ => None,
        }
    }

    fn set(&self, e: &Element<'_>) -> u64 {
        xxh3_64_with_seed(e.whole, self.seed)
    }

    fn unset(&self, name: &[u8]) -> u64 {
        xxh3_64_with_seed(name, !self.seed)
    }

    /// The fields of an update description, whatever their order; `None` where it says more than which
    /// fields were set and removed.
    fn fields(&self, description: &[u8], sync_fields: &[String]) -> Option<u64> {
        let is_sync = |name: &[u8]| sync_fields.iter().any(|f| f.as_bytes() == name);
        let mut all = 0_u64;
        for part in raw::elements(description) {
            let part = part.ok()?;
            for e in raw::elements(part.value) {
                let e = e.ok()?;
                let one = match part.name {
                    b"updatedFields" if is_sync(e.name) => continue,
                    b"updatedFields" => self.set(&e),
                    b"removedFields" => match raw::text(&e)?.as_bytes() {
                        name if is_sync(name) => continue,
                        name => self.unset(name),
                    },
                    _ => return None,
                };
                all = all.wrapping_add(one);
            }
        }
        Some(all)
    }

    /// An event arrived; `true`: it is ours, and nobody has to look at it.
    pub fn arrived(&self, side: Side, key: &Key, news: News<'_>, sync_fields: &[String]) -> bool {
        let mut all = lock(&self.debts[side as usize]);
        let Some((stage, said)) = all.get_mut(key) else {
            return false;
        };
        let ours = match (&said, news) {
            (Said::Inserted, News::Inserted) => true,
            (Said::Inserted, _) => return false,
            (Said::Updated(wanted), News::Updated(description)) => {
                self.fields(description, sync_fields) == Some(*wanted)
            }
            (Said::Updated(_), _) => false,
        };
        match stage {
            Stage::Seen => false,
            // The server may tell it otherwise: nothing is owed then, and the document is looked at.
            _ if !ours => {
                all.remove(key);
                false
            }
            Stage::Sent => {
                *stage = Stage::Seen;
                true
            }
            Stage::Owed => {
                all.remove(key);
                if all.is_empty() {
                    // A burst is over: its memory is given back.
                    *all = KeyMap::default();
                }
                true
            }
        }
    }

    /// What became of a write. `true`: it did not happen, but an event was taken for its echo, so the
    /// document must be queued as changed on that side.
    #[must_use]
    pub fn settled(&self, side: Side, key: &Key, done: bool) -> bool {
        let mut all = lock(&self.debts[side as usize]);
        match all.get_mut(key) {
            Some((stage @ Stage::Sent, _)) if done => {
                *stage = Stage::Owed;
                false
            }
            Some(_) => all.remove(key).is_some_and(|(s, _)| s == Stage::Seen) && !done,
            None => false,
        }
    }

    /// The stream of a side starts anew: what was sent before may lie before its start.
    pub fn forget(&self, side: Side) {
        lock(&self.debts[side as usize]).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Id;
    use bson::{Document, doc};

    const NONE: &[String] = &[];

    fn key(n: i32) -> Key {
        Key::new(1, &id(n))
    }

    fn id(n: i32) -> Id {
        Id::of(&doc! {"_id": n}.to_vec().unwrap()).unwrap()
    }

    fn write(n: i32, expect: Option<Document>, new: Document) -> Write {
        let bytes = |d: Document| d.to_vec().unwrap();
        Write {
            key: key(n),
            id: id(n),
            expect: expect.map(bytes),
            new: Some(bytes(new)),
        }
    }

    fn sent(n: i32) -> Echoes {
        let echoes = Echoes::default();
        let write = write(n, None, doc! {"_id": n});
        echoes.sent(Side::Remote, [(&write, &Form::Insert)].into_iter());
        echoes
    }

    /// An edit of `a` that takes `b` away.
    fn edited(n: i32) -> Echoes {
        let echoes = Echoes::default();
        let write = write(
            n,
            Some(doc! {"_id": n, "a": 1, "b": 1}),
            doc! {"_id": n, "a": 2},
        );
        let form = Form::Fields(vec![b"a".to_vec(), b"b".to_vec()]);
        echoes.sent(Side::Remote, [(&write, &form)].into_iter());
        echoes
    }

    impl Echoes {
        fn inserted(&self, side: Side, n: i32) -> bool {
            self.arrived(side, &key(n), News::Inserted, NONE)
        }

        fn updated(&self, n: i32, set: Document, unset: &[&str], sync_fields: &[String]) -> bool {
            let d = doc! {"updatedFields": set, "removedFields": unset, "truncatedArrays": []};
            let d = d.to_vec().unwrap();
            self.arrived(Side::Remote, &key(n), News::Updated(&d), sync_fields)
        }
    }

    #[test]
    fn an_edit_is_known_by_all_its_fields() {
        let ours = |set, unset: &[&str]| {
            let echoes = edited(1);
            assert!(!echoes.settled(Side::Remote, &key(1), true));
            echoes.updated(1, set, unset, &["s".to_owned()])
        };
        assert!(ours(doc! {"a": 2}, &["b"]));
        assert!(ours(doc! {"s": 7, "a": 2}, &["s", "b"]), "sync fields");
        assert!(!ours(doc! {"a": 2}, &[]), "somebody else left b");
        assert!(!ours(doc! {"a": 2, "c": 3}, &["b"]), "somebody else set c");
        assert!(!ours(doc! {"a": 2_i64}, &["b"]), "another type");
        assert!(!ours(doc! {"b": 2}, &["a"]), "another field");
        assert!(!ours(doc! {"a.x": 2}, &["b"]), "a part of a field");
    }

    #[test]
    fn an_edit_is_owed_once_and_an_earlier_one_of_others_is_looked_at() {
        let echoes = edited(1);
        assert!(
            echoes.updated(1, doc! {"a": 2}, &["b"], NONE),
            "before the answer"
        );
        assert!(!echoes.updated(1, doc! {"a": 2}, &["b"], NONE), "again");
        assert!(
            echoes.settled(Side::Remote, &key(1), false),
            "refused: look"
        );
        let echoes = edited(1);
        assert!(!echoes.updated(1, doc! {"c": 2}, &[], NONE));
        assert!(!echoes.settled(Side::Remote, &key(1), true));
        assert!(!echoes.updated(1, doc! {"a": 2}, &["b"], NONE), "given up");
    }

    #[test]
    fn one_event_is_owed_for_each_create() {
        let echoes = sent(1);
        assert!(!echoes.settled(Side::Remote, &key(1), true));
        assert!(!echoes.inserted(Side::Local, 1), "the other side's");
        assert!(!echoes.inserted(Side::Remote, 2), "another document's");
        assert!(echoes.inserted(Side::Remote, 1));
        assert!(!echoes.inserted(Side::Remote, 1), "a second insert is news");
    }

    #[test]
    fn the_event_may_come_before_the_answer() {
        let echoes = sent(1);
        assert!(echoes.inserted(Side::Remote, 1));
        assert!(!echoes.inserted(Side::Remote, 1), "a second insert is news");
        assert!(!echoes.settled(Side::Remote, &key(1), true));
        assert!(
            !echoes.inserted(Side::Remote, 1),
            "nothing is owed any more"
        );
    }

    #[test]
    fn somebody_elses_insert_is_not_lost_with_our_refused_create() {
        let echoes = sent(1);
        assert!(echoes.inserted(Side::Remote, 1));
        assert!(echoes.settled(Side::Remote, &key(1), false), "look at it");
        let echoes = sent(1);
        assert!(!echoes.settled(Side::Remote, &key(1), false));
        assert!(!echoes.inserted(Side::Remote, 1), "its event is news");
    }

    #[test]
    fn a_stream_that_starts_anew_owes_nothing() {
        let echoes = sent(1);
        echoes.forget(Side::Remote);
        assert!(!echoes.settled(Side::Remote, &key(1), true));
        assert!(!echoes.inserted(Side::Remote, 1));
    }
}
