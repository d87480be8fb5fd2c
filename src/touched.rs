//! Which documents were worked on while a comparison looked at them.
//!
//! A range is read on one side and then on the other; a document that a batch wrote in between would
//! be judged from two moments. Whoever looks keeps a [`Watch`], and whoever works notes its keys.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, Weak};

use crate::key::Key;
use crate::shared::lock;

/// Hashes of keys: two keys of one hash only cost a look too many.
type Keys = Mutex<HashSet<u64>>;

/// Everybody who looks.
#[derive(Debug, Default)]
pub struct Touched(Mutex<Vec<Weak<Keys>>>);

/// What was worked on since this was made.
#[derive(Clone, Debug)]
pub struct Watch(Arc<Keys>);

fn hash(key: &Key) -> u64 {
    xxhash_rust::xxh3::xxh3_64(key.as_bytes())
}

impl Touched {
    /// Begins to look.
    pub fn watch(&self) -> Watch {
        let watch = Watch(Arc::default());
        lock(&self.0).push(Arc::downgrade(&watch.0));
        watch
    }

    /// These documents were worked on. To be called before they are free for others.
    pub fn note(&self, keys: &[Key]) {
        let mut all = lock(&self.0);
        all.retain(|watch| {
            let Some(watch) = watch.upgrade() else {
                return false;
            };
            lock(&watch).extend(keys.iter().map(hash));
            true
        });
    }
}

impl Watch {
    /// Whether nothing was worked on meanwhile.
    pub fn saw_none(&self) -> bool {
        lock(&self.0).is_empty()
    }

    /// Whether it was worked on meanwhile.
    pub fn saw(&self, key: &Key) -> bool {
        lock(&self.0).contains(&hash(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Id;

    #[test]
    fn only_what_comes_after_the_watch_and_only_while_it_is_kept() {
        let raw = bson::doc! {"_id": 1}.to_vec().unwrap();
        let key = [Key::new(1, &Id::of(&raw).unwrap())];
        let touched = Touched::default();
        touched.note(&key);
        let watch = touched.watch();
        assert!(!watch.saw(&key[0]));
        touched.note(&key);
        assert!(watch.saw(&key[0]));
        drop(watch);
        touched.note(&key);
        assert!(lock(&touched.0).is_empty());
    }
}
