//! How long the next answer of a cursor is waited for.
//!
//! An answer that got lost on a line that stays open is never announced: until it is given up, its
//! documents wait. On a slow line an answer takes long. What is told apart here: after a wait in vain
//! the next one is twice as long for a while, so that an answer on its way arrives some day.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::deadline;
use crate::shared::lock;

/// Usually enough where the answer takes no thinking.
pub const PROMPT: Duration = Duration::from_secs(15);

/// Usually enough for an answer full of documents.
pub const READING: Duration = Duration::from_secs(60);

/// Usually enough where the server reads much before it answers, or answers with much.
pub const LONG: Duration = Duration::from_secs(240);

/// What a wait turned out to need, and until when that counts.
#[derive(Debug, Default)]
pub(super) struct Patience(Mutex<Option<(Duration, Instant)>>);

impl Patience {
    /// How long to wait where `usual` should do.
    pub(super) fn for_(&self, usual: Duration) -> Duration {
        let learned = lock(&self.0).filter(|(_, until)| Instant::now() < *until);
        learned.map_or(usual, |(wait, _)| usual.max(wait))
    }

    /// Waited so long, and no answer came.
    pub(super) fn in_vain(&self, waited: Duration) {
        let longer = (waited * 2).min(deadline(16 << 20));
        *lock(&self.0) = Some((longer, Instant::now() + longer * 4));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longer_each_time_up_to_a_limit() {
        let patience = Patience::default();
        assert_eq!(patience.for_(PROMPT), PROMPT);
        patience.in_vain(PROMPT);
        assert_eq!(patience.for_(PROMPT), PROMPT * 2);
        assert_eq!(patience.for_(LONG), LONG, "it was long enough before");
        for _ in 0..20 {
            patience.in_vain(patience.for_(PROMPT));
        }
        assert_eq!(patience.for_(PROMPT), deadline(16 << 20));
    }
}
