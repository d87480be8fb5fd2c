//! What API and CLI ask of the daemon about conflicts.

use bson::oid::ObjectId;
use serde_json::Value as Json;

use crate::command::CommandError;
use crate::config::Config;
use crate::handle::Handle;
use crate::many::{self, How, Many, Selection};
use crate::overrides::Overrides;
use crate::resolve::{self, Request, Resolution};
use crate::undo;
use crate::view::{self, Filter, Page};

impl Handle {
    /// The configuration in force: the file's with what was changed over the API.
    pub fn config(&self) -> Config {
        self.shared().settings().config.clone()
    }

    /// What was changed over the API.
    pub async fn overrides(&self) -> Result<Overrides, CommandError> {
        Ok(self.shared().store.call(Overrides::load).await?)
    }

    /// Keeps what was changed over the API.
    pub async fn save_overrides(
        &self,
        overrides: Overrides,
        who: &str,
    ) -> Result<(), CommandError> {
        let (config, who) = (self.config(), who.to_owned());
        let saved = self
            .shared()
            .store
            .call(move |c| overrides.save(c, &config, &who));
        Ok(saved.await?)
    }

    /// A page of conflicts, newest first, behind the one with the id `after`.
    pub async fn conflicts(
        &self,
        filter: &Filter,
        limit: u32,
        after: Option<ObjectId>,
    ) -> Result<Page, CommandError> {
        view::list(self.shared(), filter, limit, after).await
    }

    /// One conflict, side by side, with what each strategy would come to.
    pub async fn conflict(&self, id: ObjectId) -> Result<Json, CommandError> {
        view::detail(self.shared(), id).await
    }

    /// Resolves a conflict, or says what that would come to.
    pub async fn resolve(
        &self,
        id: ObjectId,
        request: Request,
    ) -> Result<Resolution, CommandError> {
        self.takes_orders()?;
        resolve::resolve(self.shared(), id, request, true).await
    }

    /// Resolves every open conflict of a selection in the same way.
    pub async fn resolve_many(
        &self,
        selection: Selection,
        request: Request,
    ) -> Result<Many, CommandError> {
        self.takes_orders()?;
        many::resolve_many(self.shared(), selection, How::By(request)).await
    }

    /// Resolves what can be resolved without a person.
    pub async fn auto_resolve(
        &self,
        selection: Selection,
        who: String,
    ) -> Result<Many, CommandError> {
        self.takes_orders()?;
        many::resolve_many(self.shared(), selection, How::Auto(who)).await
    }

    /// Puts back what a resolution or a policy discarded.
    pub async fn undo(
        &self,
        id: ObjectId,
        who: &str,
        value: Option<&Json>,
    ) -> Result<Resolution, CommandError> {
        self.takes_orders()?;
        undo::undo(self.shared(), id, who, value).await
    }
}
