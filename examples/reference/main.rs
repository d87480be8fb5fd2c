//! Writes the reference chapters of the book from the code: `cargo run --example reference -- docs/reference`.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs, io};

use clap::CommandFactory;
use sangam::api::openapi;
use sangam::cli::Args;
use serde_json::Value;

fn main() -> io::Result<()> {
    let folder = env::args_os()
        .nth(1)
        .ok_or_else(|| io::Error::other("usage: reference FOLDER"))?;
    let folder = Path::new(&folder);
    fs::create_dir_all(folder)?;
    fs::write(folder.join("configuration.md"), configuration())?;
    fs::write(folder.join("commands.md"), commands())?;
    fs::write(folder.join("api.md"), api()?)
}

/// The example file is the reference: a test holds it to the code's own table of keys.
fn configuration() -> String {
    let file = include_str!("../../config/sangam.toml");
    format!(
        "# Configuration\n\nEvery key with its default. A key unknown or out of range is an error that names \
         file, line and the nearest valid key.\n\n```toml\n{file}```\n"
    )
}

fn commands() -> String {
    let options = clap_markdown::MarkdownOptions::new()
        .title("Commands".to_owned())
        .show_footer(false)
        .show_table_of_contents(true);
    let mut command = Args::command();
    command.build();
    clap_markdown::help_markdown_command_custom(&command, &options)
}

fn api() -> io::Result<String> {
    let document = serde_json::to_value(openapi::described()).map_err(io::Error::other)?;
    let mut page = String::from(
        "# HTTP API\n\nJSON; errors are `{\"detail\": …}` with the right status. A bearer token where one is \
         configured. `/openapi.json` of a running daemon has the shapes in full.\n",
    );
    let nothing = serde_json::Map::new();
    for (path, methods) in document["paths"].as_object().unwrap_or(&nothing) {
        for (method, operation) in methods.as_object().unwrap_or(&nothing) {
            section(&mut page, path, method, operation).map_err(io::Error::other)?;
        }
    }
    Ok(page)
}

fn section(page: &mut String, path: &str, method: &str, operation: &Value) -> std::fmt::Result {
    let text = |key: &str| operation[key].as_str().unwrap_or_default().trim();
    writeln!(page, "\n## `{} {path}`\n", method.to_uppercase())?;
    writeln!(page, "{}.", text("summary").trim_end_matches('.'))?;
    if !text("description").is_empty() {
        writeln!(page, "\n{}", text("description"))?;
    }
    let parameters = operation["parameters"].as_array();
    for (i, parameter) in parameters.into_iter().flatten().enumerate() {
        if i == 0 {
            writeln!(page)?;
        }
        let words = parameter["description"].as_str().unwrap_or_default();
        let name = parameter["name"].as_str().unwrap_or_default();
        writeln!(page, "- `{name}`: {}", words.replace('\n', " "))?;
    }
    let body = &operation["requestBody"]["content"]["application/json"]["schema"]["$ref"];
    if let Some(body) = shape(body) {
        writeln!(page, "\nBody: `{body}`.")?;
    }
    let answers = operation["responses"].as_object();
    let answers: Vec<String> = answers
        .into_iter()
        .flatten()
        .map(|(status, answer)| {
            let schema = &answer["content"]["application/json"]["schema"];
            let one = shape(&schema["$ref"]).map(|name| format!(" `{name}`"));
            let many = shape(&schema["items"]["$ref"]).map(|name| format!(" list of `{name}`"));
            format!("{status}{}", one.or(many).unwrap_or_default())
        })
        .collect();
    writeln!(page, "\nAnswers: {}.", answers.join(", "))
}

fn shape(reference: &Value) -> Option<&str> {
    reference.as_str()?.rsplit('/').next()
}
