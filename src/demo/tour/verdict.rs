//! Chapter 7: everything is read from both databases and compared.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::Tour;
use crate::demo::judge::{self, Conflict};
use crate::demo::say::{count, thousands};
use crate::demo::stage::counts;

/// Differences that are listed at most.
const LISTED: usize = 10;

impl Tour<'_> {
    /// Chapter 7. An error if anything differs that no open conflict explains.
    pub(super) async fn verdict(&self) -> Result<()> {
        let voice = self.voice;
        voice.chapter(7, "Are they equal?");
        voice.say("Every document is read from both databases and compared, byte for byte.");
        let found = self.stage.compare().await?;
        let conflicts = self.stage.open_conflicts().await?;
        let local: BTreeMap<String, u64> = counts(&self.stage.local).await?.into_iter().collect();
        let remote: BTreeMap<String, u64> = counts(&self.stage.remote).await?.into_iter().collect();
        let different = judge::by_collection(&found);
        let mut names: Vec<&String> = local.keys().chain(remote.keys()).collect();
        names.sort();
        names.dedup();
        let number = |n: u64| {
            if n == 0 {
                "·".to_owned()
            } else {
                thousands(n)
            }
        };
        let mut rows: Vec<Vec<String>> = names
            .into_iter()
            .map(|name| {
                let of = |side: &BTreeMap<String, u64>| side.get(name).copied().unwrap_or(0);
                let differ = different.get(name.as_str()).copied().unwrap_or(0);
                vec![
                    name.clone(),
                    number(of(&local)),
                    number(of(&remote)),
                    number(differ),
                ]
            })
            .collect();
        rows.push(vec![
            "all".into(),
            number(local.values().sum()),
            number(remote.values().sum()),
            number(found.differences.len() as u64),
        ]);
        voice.table(&["", "temple", "cloud", "different"], &rows, &[1, 2, 3]);

        let left = judge::unexplained(&found, &conflicts);
        if !left.is_empty() {
            for difference in left.iter().take(LISTED) {
                voice.bad(&judge::describe(difference));
            }
            bail!(
                "{} differ without a conflict on record",
                count(left.len() as u64, "document")
            );
        }
        voice.good(&format!(
            "{} are equal on both sides.",
            count(found.equal, "document")
        ));
        if found.is_equal() {
            return Ok(());
        }
        voice.say(&format!(
            "The rest ({}) belongs to {}:",
            judge::where_they_are(&found),
            count(conflicts.len() as u64, "open conflict")
        ));
        let rows: Vec<Vec<String>> = conflicts.iter().map(in_words).collect();
        voice.table(&["collection", "field", "value", "kind"], &rows, &[]);
        Ok(())
    }
}

fn in_words(conflict: &Conflict) -> Vec<String> {
    let value = conflict
        .local
        .get(&conflict.field)
        .or(conflict.remote.get(&conflict.field));
    vec![
        conflict.collection.clone(),
        conflict.field.clone(),
        value.map(judge::plain).unwrap_or_default(),
        conflict.kind_in_words(),
    ]
}
