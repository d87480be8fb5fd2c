//! What a batch moved: told to runs, metrics and activity once for each side and collection, since telling
//! it of each document costs more than deciding what becomes of it.

use std::sync::Arc;

use crate::batch::Namespace;
use crate::decide::Side;
use crate::shared::{Shared, lock};

/// Documents written to one side of one collection.
struct Load {
    to: Side,
    ns: Arc<Namespace>,
    bytes: usize,
    /// How long each waited after its change was noted, ms.
    waited: Vec<i64>,
}

/// Documents written, by side and collection.
#[derive(Default)]
pub(crate) struct Moved(Vec<Load>);

impl Moved {
    /// Adds a document of so many bytes, written to `to`.
    pub(crate) fn add(&mut self, to: Side, ns: &Arc<Namespace>, bytes: usize, waited: i64) {
        // One or two, as a rule.
        let known = |load: &&mut Load| load.to == to && load.ns.number == ns.number;
        match self.0.iter_mut().find(known) {
            Some(load) => {
                load.bytes += bytes;
                load.waited.push(waited);
            }
            None => self.0.push(Load {
                to,
                ns: ns.clone(),
                bytes,
                waited: vec![waited],
            }),
        }
    }

    /// Tells everyone who counts; `now` in ms since 1970.
    pub(crate) fn tell(self, shared: &Shared, now: i64) {
        for load in self.0 {
            let (shown, documents) = (&load.ns.shown, load.waited.len());
            shared.runs.moved(load.to, shown, documents, load.bytes);
            shared.metrics.moved(load.to, load.bytes, &load.waited);
            lock(&shared.activity).insert(shown.clone(), now);
        }
    }
}
