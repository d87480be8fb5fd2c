//! The book in `docs`: every page is listed, every link leads somewhere, every command works.

use std::path::{Path, PathBuf};

use crate::common::{World, conflict};

#[path = "../../benches/confluence/picture.rs"]
mod picture;

/// Pages that `docs/build` makes from the code.
const MADE: &str = "reference/";

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")
}

/// Every Markdown file below `docs`, as a path from there.
fn pages() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![docs()];
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "md") {
                found.push(path.strip_prefix(docs()).unwrap().to_owned());
            }
        }
    }
    found.retain(|page| !page.starts_with(MADE));
    found.sort();
    found
}

/// Where the links of a page lead, without the parts behind `#`.
fn links(text: &str) -> Vec<&str> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')'))
        .map(|(target, _)| target.split('#').next().unwrap())
        .filter(|target| !target.is_empty() && !target.contains("://"))
        .collect()
}

#[test]
fn every_page_is_in_the_table_of_contents() {
    let contents = std::fs::read_to_string(docs().join("SUMMARY.md")).unwrap();
    for page in pages() {
        let page = page.to_str().unwrap();
        assert!(
            page == "SUMMARY.md" || contents.contains(&format!("({page})")),
            "docs/SUMMARY.md does not list {page}"
        );
    }
}

#[test]
fn every_link_leads_somewhere() {
    let mut files: Vec<PathBuf> = pages().iter().map(|page| docs().join(page)).collect();
    let root = docs().parent().unwrap().to_owned();
    files.extend(["README.md", "CONTRIBUTING.md"].map(|file| root.join(file)));
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for link in links(&text) {
            let target = file.parent().unwrap().join(link);
            let made = target
                .strip_prefix(docs())
                .is_ok_and(|t| t.starts_with(MADE));
            assert!(
                made || target.exists(),
                "{}: {link} leads nowhere",
                file.display()
            );
        }
    }
}

/// The lines after `$ ` in blocks marked `console`; blocks marked `sh` are for a machine with systemd or Docker.
fn commands(text: &str) -> Vec<&str> {
    let mut inside = false;
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(kind) = line.strip_prefix("```") {
            inside = kind == "console";
        } else if let Some(command) = line.strip_prefix("$ ").filter(|_| inside) {
            found.push(command);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_works() {
    let world = World::new("book").await;
    let daemon = world.start().await;
    conflict::modified(&world, &daemon, 1).await;
    let open = conflict::open(&daemon, 1).await;
    let conflict = open[0]["_id"].as_str().unwrap();

    let mut ran = 0;
    for page in pages() {
        let text = std::fs::read_to_string(docs().join(&page)).unwrap();
        for command in commands(&text) {
            let mut words = command.split('#').next().unwrap().split_whitespace();
            assert_eq!(
                words.next(),
                Some("sangam"),
                "{}: {command}",
                page.display()
            );
            let arguments: Vec<&str> = words
                .map(|word| if word == "ID" { conflict } else { word })
                .collect();
            if arguments[0] == "demo" {
                continue; // demo.rs
            }
            let output = daemon.settings.cli(&arguments);
            let code = output.status.code().unwrap();
            assert!(
                code == 0 || code == 3,
                "{}: `{command}` exits with {code}: {}",
                page.display(),
                String::from_utf8_lossy(&output.stderr)
            );
            ran += 1;
        }
    }
    assert!(ran >= 15, "only {ran} commands were found in the book");
}

#[test]
fn the_picture_of_the_figures_shows_what_the_page_says() {
    let read = |name| std::fs::read_to_string(docs().join(name)).unwrap();
    assert!(
        picture::draw(&read("performance.md")) == read("performance.svg"),
        "docs/performance.md has changed: cargo bench --profile dev --bench confluence -- \
         --draw docs/performance.md --svg docs/performance.svg"
    );
}
