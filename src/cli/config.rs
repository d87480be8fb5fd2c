//! `sangam config`: read without the daemon.

use std::process::ExitCode;

use serde_json::json;

use super::table::table;
use super::{Failure, Output};
use crate::config::Loaded;

pub(super) fn list(loaded: &Loaded, output: Output) -> Result<ExitCode, Failure> {
    let entries = loaded.entries();
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

pub(super) fn get(loaded: &Loaded, key: &str, output: Output) -> Result<ExitCode, Failure> {
    let entries = loaded.entries();
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
