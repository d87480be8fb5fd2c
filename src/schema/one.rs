//! A look at one collection: what is planned is done, or said.

use std::sync::Arc;

use super::build::{self, Build, Refusal};
use super::definition::{Definition, Index};
use super::findings::{self, FindingKind, Findings};
use super::plan::{Step, Trees, plan};
use super::{Ask, note_volatile};
use crate::config::SchemaSync;
use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};
use crate::store::definitions::{self, Tree};

/// A look at one collection.
pub(super) struct One<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) settings: &'a Settings,
    pub(super) names: (&'a str, &'a str),
    pub(super) ns: u32,
    pub(super) ask: Ask,
    /// What was refused before.
    pub(super) known: &'a [Refusal],
    /// What is refused now.
    pub(super) refusals: &'a mut Vec<Refusal>,
    pub(super) findings: &'a mut Findings,
}

impl One<'_> {
    pub(super) async fn look(
        &mut self,
        local: Option<&Definition>,
        remote: Option<&Definition>,
    ) -> Result<(), Failure> {
        let shared = self.shared;
        let ns = self.ns;
        let seen = [local.cloned(), remote.cloned()];
        let base = shared
            .store
            .call(move |c| {
                let [local, remote] = &seen;
                definitions::put(c, ns, Tree::Seen(Side::Local), local.as_ref())?;
                definitions::put(c, ns, Tree::Seen(Side::Remote), remote.as_ref())?;
                definitions::get(c, ns, Tree::Base)
            })
            .await
            .map_err(store_failed)?;
        note_volatile(shared, ns, Side::Local, local);
        note_volatile(shared, ns, Side::Remote, remote);
        if lock(&shared.halted).contains(ns) {
            return Ok(());
        }
        let trees = Trees {
            local,
            base: base.as_ref(),
            remote,
        };
        let (steps, agreed) = plan(trees, self.settings.config.schema_sync);
        for step in steps {
            self.step(step).await?;
        }
        self.pull_index(remote).await?;
        if agreed != base {
            let stored = shared
                .store
                .call(move |c| definitions::put(c, ns, Tree::Base, agreed.as_ref()));
            stored.await.map_err(store_failed)?;
        }
        Ok(())
    }

    /// Whether something may be made now, by configuration or because a person asked.
    fn may_make(&self) -> bool {
        let config = &self.settings.config;
        self.shared.may_work()
            && (self.ask.create
                || (config.schema_sync != SchemaSync::Report && config.sync.auto_sync_enabled))
    }

    async fn step(&mut self, step: Step) -> Result<(), Failure> {
        match step {
            Step::Create { on, options } if self.may_make() => {
                let (db, coll) = self.names;
                build::create_collection(self.shared, on, (db, coll), options)
                    .await
                    .or_else(|f| self.refused(on, None, f))
            }
            Step::Modify { on, change } if self.may_make() => {
                let (db, coll) = self.names;
                let what = change.keys().cloned().collect::<Vec<_>>().join(", ");
                build::modify(self.shared, on, (db, coll), change)
                    .await
                    .or_else(|f| self.refused(on, Some(what), f))
            }
            Step::Create { on, .. } => {
                self.find(
                    FindingKind::Missing,
                    on,
                    None,
                    "the collection is not there".into(),
                );
                Ok(())
            }
            Step::Modify { on, change } => {
                let what = change.keys().cloned().collect::<Vec<_>>().join(", ");
                let text = format!("{what} changed on the {} side", on.other().name());
                self.find(FindingKind::Options, on, None, text);
                Ok(())
            }
            Step::Index { on, index } => self.index(on, index, FindingKind::Missing).await,
            Step::Dropped { on, index } if self.ask.create => {
                self.index(on, index, FindingKind::Dropped).await
            }
            Step::Dropped { on, index } => {
                let text = format!(
                    "both sides had it; it was dropped on the {} side. `sangam schema --create` makes it \
                     there again; or drop it on the {} side, too",
                    on.name(),
                    on.other().name()
                );
                self.find(FindingKind::Dropped, on, Some(&index.name), text);
                Ok(())
            }
            Step::Differ {
                name,
                what,
                changed,
            } => {
                let text = format!(
                    "the two sides have it with other {}{}; drop the wrong one, and it is made like the other",
                    what.join(", "),
                    changed_text(changed)
                );
                self.findings
                    .add(self.shown(), None, FindingKind::Differs, Some(name), text);
                Ok(())
            }
            Step::Options { what, changed } => {
                let text = format!(
                    "the collection's {} differ{}",
                    what.join(", "),
                    changed_text(changed)
                );
                self.findings
                    .add(self.shown(), None, FindingKind::Options, None, text);
                Ok(())
            }
        }
    }

    /// Makes an index now if the collection is empty there, or puts it down for the builder.
    async fn index(&mut self, on: Side, index: Index, kind: FindingKind) -> Result<(), Failure> {
        let build = Build {
            side: on,
            db: self.names.0.to_owned(),
            coll: self.names.1.to_owned(),
            index,
        };
        if let Some(refusal) = self.known.iter().find(|r| r.is_about(&build))
            && !self.ask.retry
            && !self.ask.create
        {
            self.findings.refused(self.shown(), refusal);
            self.refusals.push(refusal.clone());
            return Ok(());
        }
        if !self.may_make() {
            let text = format!("the {} side has it", on.other().name());
            self.find(kind, on, Some(&build.index.name), text);
            return Ok(());
        }
        if !self.ask.create
            && let Some(ttl) = build.index.ttl()
            && build::holds_due(self.shared, &build, &ttl).await?
        {
            let text = format!(
                "with it the {} side would delete documents that are due already; if that is meant, \
                 `sangam schema --create` makes it",
                on.name()
            );
            self.find(FindingKind::WouldExpire, on, Some(&build.index.name), text);
            return Ok(());
        }
        if !build::is_empty(self.shared, &build).await? {
            let mut builds = lock(&self.shared.schema.builds);
            if !builds.contains(&build) {
                builds.push(build);
            }
            return Ok(());
        }
        match build::create(self.shared, &build).await {
            Ok(()) => Ok(()),
            Err(failure) if failure.class == Class::Rejected => {
                let refusal = Refusal::new(&build, &failure);
                self.findings.refused(self.shown(), &refusal);
                self.refusals.push(refusal);
                Ok(())
            }
            Err(failure) => Err(failure),
        }
    }

    /// A timestamp pull of a large collection reads all of it without an index on the timestamp.
    async fn pull_index(&mut self, remote: Option<&Definition>) -> Result<(), Failure> {
        const LARGE: u64 = 1000;
        let Some(remote) = remote.filter(|_| !self.shared.follows()) else {
            return Ok(());
        };
        let (db, coll) = self.names;
        let fields = &self.settings.config.fields;
        let stamped = self.settings.config.sync.stamp_documents;
        let needed = [&fields.updated_at, &fields.synced_at];
        for field in needed.into_iter().take(if stamped { 2 } else { 1 }) {
            if remote.indexes.iter().any(|i| i.serves(field))
                || build::count(self.shared, Side::Remote, (db, coll)).await? < LARGE
            {
                continue;
            }
            let index = Index {
                name: format!("{field}_1"),
                key: bson::doc! {field: 1},
                options: bson::Document::new(),
            };
            if self.ask.create {
                self.index(Side::Remote, index, FindingKind::NoPullIndex)
                    .await?;
            } else {
                let text = format!(
                    "changes are asked for by {field}, and without an index on it each time the whole \
                     collection is read; `sangam schema --create` makes it"
                );
                self.find(
                    FindingKind::NoPullIndex,
                    Side::Remote,
                    Some(&index.name),
                    text,
                );
            }
        }
        Ok(())
    }

    fn shown(&self) -> String {
        self.settings.display(self.names.0, self.names.1)
    }

    fn find(&mut self, kind: FindingKind, on: Side, index: Option<&str>, text: String) {
        self.findings
            .add(self.shown(), Some(on), kind, index.map(str::to_owned), text);
    }

    /// A refusal of what is no index: reported, and tried again at the next look.
    fn refused(&mut self, on: Side, what: Option<String>, failure: Failure) -> Result<(), Failure> {
        if !failure.is_refusal() {
            return Err(failure);
        }
        let what = what.unwrap_or_else(|| "making the collection".into());
        let text = format!(
            "{what}: the {} database refuses it: {failure}{}",
            on.name(),
            findings::hint(failure.code)
        );
        self.find(FindingKind::Refused, on, None, text);
        Ok(())
    }
}

fn changed_text(changed: Option<Side>) -> String {
    changed.map_or(String::new(), |side| {
        format!(" (the {} side changed since both agreed)", side.name())
    })
}
