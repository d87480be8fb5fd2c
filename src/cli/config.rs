//! `sangam config`: the file is read without the daemon; what was changed over the API, from it.

use std::process::ExitCode;

use serde_json::{Map, Value, json};

use super::table::table;
use super::{Failure, Output};
use crate::client::Client;
use crate::config::{ConfigEntry, Loaded};
use crate::overrides::NAMES;

pub(super) async fn list(
    loaded: &Loaded,
    client: Client,
    output: Output,
) -> Result<ExitCode, Failure> {
    let entries = entries(loaded, &client).await;
    let file = loaded.file().map(|file| file.display().to_string());
    output.answer(&json!({ "file": file, "settings": entries }), || {
        let rows = entries
            .iter()
            .map(|entry| vec![entry.key.clone(), entry.text.clone(), entry.origin.clone()]);
        let file = file
            .as_deref()
            .unwrap_or("none; all values are defaults or from the environment");
        format!("file: {file}\n\n{}", table(&["key", "value", "from"], rows))
    });
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn get(
    loaded: &Loaded,
    client: Client,
    key: &str,
    output: Output,
) -> Result<ExitCode, Failure> {
    let entries = entries(loaded, &client).await;
    let file_key = NAMES.iter().find(|(api, _)| *api == key).map(|(_, f)| *f);
    let key = file_key.unwrap_or(key);
    let Some(entry) = entries.iter().find(|entry| entry.key == key) else {
        return Err(Failure::new(
            format!("there is no key `{key}`"),
            Some("`sangam config` lists all keys"),
            2,
        ));
    };
    output.answer(entry, || entry.text.clone());
    Ok(ExitCode::SUCCESS)
}

/// The file's entries, and over them what was changed in the daemon, if one runs.
async fn entries(loaded: &Loaded, client: &Client) -> Vec<ConfigEntry> {
    let mut entries = loaded.entries();
    let Ok(now) = client.get::<Map<String, Value>>("/api/sync/config").await else {
        return entries;
    };
    let changed = now.get("changedHere").and_then(Value::as_array);
    for name in changed.into_iter().flatten().filter_map(Value::as_str) {
        let key = NAMES.iter().find(|(api, _)| *api == name).map(|(_, f)| *f);
        let Some(entry) = entries.iter_mut().find(|e| Some(e.key.as_str()) == key) else {
            continue;
        };
        let value = now.get(name).cloned().unwrap_or_default();
        entry.origin = format!("API, instead of {} ({})", entry.text, entry.origin);
        entry.text = match (&value, name) {
            (Value::Array(items), _) => items
                .iter()
                .map(|i| i.as_str().unwrap_or_default())
                .collect::<Vec<_>>()
                .join(", "),
            (Value::String(text), _) => text.clone(),
            (minutes, "syncIntervalMinutes") => {
                format!("{}s", (minutes.as_f64().unwrap_or(0.0) * 60.0).round())
            }
            (other, _) => other.to_string(),
        };
        entry.value = if name == "syncIntervalMinutes" {
            entry.text.clone().into()
        } else {
            value
        };
    }
    entries
}

pub(super) async fn set(
    client: Client,
    key: &str,
    value: Option<&str>,
    output: Output,
) -> Result<ExitCode, Failure> {
    let Some((api, file)) = NAMES.iter().find(|(api, file)| *api == key || *file == key) else {
        let known: Vec<&str> = NAMES.iter().map(|(_, file)| *file).collect();
        return Err(Failure::new(
            format!("`{key}` can't be changed while the daemon runs"),
            Some(&format!(
                "these can: {}; for the others, edit the file and run `systemctl reload sangam` (or restart it)",
                known.join(", ")
            )),
            2,
        ));
    };
    let json = match value {
        None => Value::Null,
        Some(text) => parse(api, text),
    };
    let now: Map<String, Value> = client
        .put("/api/sync/config", json!({ *api: json }))
        .await?;
    output.answer(&now, || {
        let value = now.get(*api).cloned().unwrap_or_default();
        match json {
            Value::Null => format!("{file} is {value} again, as in the file"),
            _ => format!(
                "{file} is {value} now, also after a restart; `sangam config unset {file}` takes it back"
            ),
        }
    });
    Ok(ExitCode::SUCCESS)
}

/// A text of the command line as the API wants it; what it can't be stays a text, which the API refuses.
fn parse(name: &str, text: &str) -> Value {
    match name {
        "collectionsToSync" | "collectionsFirst" | "collectionsLast"
            if !text.trim_start().starts_with('[') =>
        {
            let globs = text.split(',').map(str::trim);
            globs.filter(|glob| !glob.is_empty()).collect()
        }
        "conflictResolutionStrategy" => text.into(),
        "syncIntervalMinutes" if text.parse::<f64>().is_err() => {
            humantime::parse_duration(text).map_or(text.into(), |d| json!(d.as_secs_f64() / 60.0))
        }
        _ => serde_json::from_str(text).unwrap_or_else(|_| text.into()),
    }
}
