//! The rights that Sangam needs, no more, as a role for `mongosh`.

use std::collections::BTreeSet;

use bson::Document;

use crate::config::Config;

/// Name of the role.
pub const ROLE: &str = "sangam";

/// What is done in each synced database.
const ACTIONS: [&str; 10] = [
    "find",
    "insert",
    "update",
    "remove",
    "changeStream",
    "listCollections",
    "listIndexes",
    "createCollection",
    "createIndex",
    "collStats",
];

/// Needed only for what is turned on.
const DROPS: [&str; 3] = ["dropCollection", "dropIndex", "collMod"];

/// Without these things work, less well: which one, and what is missing then.
const WISHES: [(&str, &str); 2] = [
    (
        "replSetGetConfig",
        "one cluster can't be told from another of the same name",
    ),
    (
        "killAnySession",
        "a transaction that a crash leaves open lasts up to a minute",
    ),
];

/// What has to be allowed in each synced database.
pub fn needed(config: &Config) -> Vec<&'static str> {
    let drops = config.sync.on_drop == crate::config::OnDrop::Propagate
        || config.schema_sync == crate::config::SchemaSync::Full;
    let mut actions = ACTIONS.to_vec();
    if drops {
        actions.extend(DROPS);
    }
    actions
}

/// What is lacking in a database, given the answer to `connectionStatus` with its privileges.
pub fn lacking(privileges: &[Document], db: &str, config: &Config) -> Vec<&'static str> {
    let mut may: BTreeSet<&str> = BTreeSet::new();
    for privilege in privileges {
        let Ok(resource) = privilege.get_document("resource") else {
            continue;
        };
        let on = resource.get_str("db").ok();
        let all = resource.get_str("collection").is_ok_and(str::is_empty);
        let everywhere = resource.get_bool("anyResource").unwrap_or(false);
        if everywhere || (all && (on == Some(db) || on == Some(""))) {
            let actions = privilege.get_array("actions").into_iter().flatten();
            may.extend(actions.filter_map(|a| a.as_str()));
        }
    }
    let any = may.contains("anyAction");
    needed(config)
        .into_iter()
        .filter(|action| !any && !may.contains(action))
        .collect()
}

/// The wishes that are not granted, and what is missing without them.
pub fn wished(privileges: &[Document]) -> Vec<(&'static str, &'static str)> {
    let may = |wish: &str| {
        privileges.iter().any(|p| {
            p.get_array("actions")
                .into_iter()
                .flatten()
                .any(|a| a.as_str().is_some_and(|a| a == wish || a == "anyAction"))
        })
    };
    WISHES.into_iter().filter(|(wish, _)| !may(wish)).collect()
}

/// The lines for `mongosh` that make the role and a user with it; the password is asked for.
pub fn create_role(config: &Config) -> Vec<String> {
    let actions = quoted(&needed(config));
    let mut lines = vec![
        "use admin".to_owned(),
        format!("db.createRole({{ role: \"{ROLE}\", roles: [], privileges: ["),
    ];
    for db in &config.databases {
        lines.push(format!(
            "  {{ resource: {{ db: \"{db}\", collection: \"\" }}, actions: [{actions}] }},"
        ));
    }
    let wishes: Vec<&str> = WISHES.iter().map(|(wish, _)| *wish).collect();
    lines.push(format!(
        "  {{ resource: {{ cluster: true }}, actions: [{}] }},",
        quoted(&wishes)
    ));
    lines.push("  { resource: { db: \"local\", collection: \"oplog.rs\" }, actions: [\"find\", \"collStats\"] }".into());
    lines.push("] })".into());
    lines.push(format!(
        "db.createUser({{ user: \"{ROLE}\", pwd: passwordPrompt(), roles: [\"{ROLE}\"] }})"
    ));
    lines
}

fn quoted(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::doc;

    #[test]
    fn what_is_lacking_is_told_by_database() {
        let config = Config::from_toml("database = [\"a\", \"b\"]").unwrap();
        let all = needed(&config);
        let on = |db: &str, actions: &[&str]| {
            doc! {"resource": {"db": db, "collection": ""}, "actions": actions.to_vec()}
        };
        let privileges = [on("a", &all), on("b", &["find", "insert"])];
        assert!(lacking(&privileges, "a", &config).is_empty());
        assert!(lacking(&privileges, "b", &config).contains(&"changeStream"));
        assert!(!lacking(&privileges, "b", &config).contains(&"find"));
        let root = [doc! {"resource": {"anyResource": true}, "actions": ["anyAction"]}];
        assert!(lacking(&root, "b", &config).is_empty() && wished(&root).is_empty());
        assert!(create_role(&config).iter().any(|l| l.contains("db: \"b\"")));
    }
}
