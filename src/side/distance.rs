//! How far away a server is, as the time until its answers tell.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

/// An answer that takes longer comes from afar, not from a server next door.
const FAR: Duration = Duration::from_millis(20);

/// A quick answer counts for so many that follow: on busy processors most answers of a server next door
/// are late, and from afar none is quick.
const MEMORY: u8 = 8;

/// Whether a server is far away.
#[derive(Debug, Default)]
pub(super) struct Distance {
    far: AtomicBool,
    /// Answers for which the last quick one still counts.
    near_for: AtomicU8,
}

impl Distance {
    /// An answer took that long.
    pub(super) fn answered(&self, after: Duration) {
        let near_for = match after > FAR {
            true => self.near_for.load(Ordering::Relaxed).saturating_sub(1),
            false => MEMORY,
        };
        self.near_for.store(near_for, Ordering::Relaxed);
        self.far.store(near_for == 0, Ordering::Relaxed);
    }

    pub(super) fn is_far(&self) -> bool {
        self.far.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_answers_alone_make_a_server_far() {
        let distance = Distance::default();
        assert!(!distance.is_far(), "nothing is known yet");
        let [quick, late] = [1, 100].map(Duration::from_millis);
        distance.answered(late);
        assert!(distance.is_far());
        distance.answered(quick);
        for _ in 1..MEMORY {
            distance.answered(late);
            assert!(!distance.is_far(), "it was quick a moment ago");
        }
        distance.answered(late);
        assert!(distance.is_far());
    }
}
