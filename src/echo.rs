//! Echoes: the insert events of our own creates, told apart before they reach a queue.
//!
//! A create that a side acknowledged comes back on that side's stream as an insert event. It tells
//! nothing new, but nor does it say what was inserted, so without more it would cost a row in the
//! queue and a look at both sides. Here each stream owes one insert event for each create; the
//! first one that arrives is that debt, or an older one of somebody else's: whatever makes the
//! document differ from base later has a later event.
//!
//! The event may arrive before the acknowledgement. If the write then fails, somebody else inserted
//! the document, and the caller must queue it. All of this is in memory: after a crash, events that
//! nobody expects are looked at, and writes without an answer have their intents.

use std::collections::HashMap;
use std::sync::Mutex;

use crate::decide::Side;
use crate::key::Key;
use crate::shared::lock;

/// Most creates whose event is waited for, a side; beyond it they are looked at instead.
const MOST: usize = 200_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// On its way, no answer and no event yet.
    Sent,
    /// The event was there before the answer.
    Seen,
    /// Acknowledged; the event is owed.
    Owed,
}

/// Creates of ours whose insert event may still come, by side.
#[derive(Debug, Default)]
pub struct Echoes([Mutex<HashMap<Key, Stage>>; 2]);

impl Echoes {
    /// These creates are about to be sent to a side.
    pub fn sent<'a>(&self, side: Side, keys: impl Iterator<Item = &'a Key>) {
        let mut all = lock(&self.0[side as usize]);
        for key in keys {
            if all.len() < MOST {
                all.insert(key.clone(), Stage::Sent);
            }
        }
    }

    /// An insert event arrived; `true`: it is ours, and nobody has to look at it.
    pub fn arrived(&self, side: Side, key: &Key) -> bool {
        let mut all = lock(&self.0[side as usize]);
        match all.get_mut(key) {
            Some(stage @ Stage::Sent) => {
                *stage = Stage::Seen;
                true
            }
            Some(Stage::Owed) => all.remove(key).is_some(),
            Some(Stage::Seen) | None => false,
        }
    }

    /// What became of a create. `true`: it did not happen, but an insert event was taken for its
    /// echo, so the document must be queued as changed on that side.
    #[must_use]
    pub fn settled(&self, side: Side, key: &Key, done: bool) -> bool {
        let mut all = lock(&self.0[side as usize]);
        match all.get_mut(key) {
            Some(stage @ Stage::Sent) if done => {
                *stage = Stage::Owed;
                false
            }
            Some(_) => all.remove(key) == Some(Stage::Seen) && !done,
            None => false,
        }
    }

    /// The stream of a side starts anew: what was sent before may lie before its start.
    pub fn forget(&self, side: Side) {
        lock(&self.0[side as usize]).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Id;

    fn key(n: i32) -> Key {
        let raw = bson::doc! {"_id": n}.to_vec().unwrap();
        Key::new(1, &Id::of(&raw).unwrap())
    }

    fn sent(n: i32) -> Echoes {
        let echoes = Echoes::default();
        echoes.sent(Side::Remote, [key(n)].iter());
        echoes
    }

    #[test]
    fn one_event_is_owed_for_each_create() {
        let echoes = sent(1);
        assert!(!echoes.settled(Side::Remote, &key(1), true));
        assert!(!echoes.arrived(Side::Local, &key(1)), "the other side's");
        assert!(!echoes.arrived(Side::Remote, &key(2)), "another document's");
        assert!(echoes.arrived(Side::Remote, &key(1)));
        assert!(
            !echoes.arrived(Side::Remote, &key(1)),
            "a second insert is news"
        );
    }

    #[test]
    fn the_event_may_come_before_the_answer() {
        let echoes = sent(1);
        assert!(echoes.arrived(Side::Remote, &key(1)));
        assert!(
            !echoes.arrived(Side::Remote, &key(1)),
            "a second insert is news"
        );
        assert!(!echoes.settled(Side::Remote, &key(1), true));
        assert!(
            !echoes.arrived(Side::Remote, &key(1)),
            "nothing is owed any more"
        );
    }

    #[test]
    fn somebody_elses_insert_is_not_lost_with_our_refused_create() {
        let echoes = sent(1);
        assert!(echoes.arrived(Side::Remote, &key(1)));
        assert!(echoes.settled(Side::Remote, &key(1), false), "look at it");
        let echoes = sent(1);
        assert!(!echoes.settled(Side::Remote, &key(1), false));
        assert!(!echoes.arrived(Side::Remote, &key(1)), "its event is news");
    }

    #[test]
    fn a_stream_that_starts_anew_owes_nothing() {
        let echoes = sent(1);
        echoes.forget(Side::Remote);
        assert!(!echoes.settled(Side::Remote, &key(1), true));
        assert!(!echoes.arrived(Side::Remote, &key(1)));
    }
}
