//! What the command line prints, against files that a person has looked at.
//!
//! `SANGAM_SNAPSHOTS=write` writes what is printed to `tests/snapshots`, to be looked at and committed.

use std::process::Output;

use super::Daemon;

/// Runs a command to its end: its exit code, and what it wrote.
pub fn cli(daemon: &Daemon, args: &[&str]) -> (i32, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = daemon.settings.cli(args);
    let text = String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap();
    (status.code().unwrap(), text)
}

/// Ids, times and random letters differ from run to run.
pub fn masked(text: &str, ids: &[&str]) -> String {
    // Whichever direction came first found the clash.
    let mut text = text.replace("document on the local side", "document on the remote side");
    for (i, id) in ids.iter().enumerate() {
        text = text.replace(id, &format!("<conflict {}>", i + 1));
    }
    let words: Vec<String> = text
        .split_inclusive([' ', '\n'])
        .map(|word| {
            let bare = word.trim_end();
            let rest = &word[bare.len()..];
            if let Some(at) = bare.find("john_admin_") {
                let end = at + "john_admin_".len();
                return format!(
                    "{}<xxxx>{}{rest}",
                    &bare[..end],
                    bare.get(end + 4..).unwrap_or_default()
                );
            }
            if bare.len() >= 10 && bare[..4].parse::<u32>().is_ok() && bare[4..].starts_with('-') {
                return format!("<date>{rest}");
            }
            if bare.len() == 8 && bare.matches(':').count() == 2 {
                return format!("<time>{rest}");
            }
            word.to_owned()
        })
        .collect();
    let text = words.concat();
    // "(2 s ago)", "(1 m 5 s ago)"
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some(end) = rest.find(" ago)") {
        let start = rest[..end].rfind('(').unwrap();
        out.push_str(&rest[..start]);
        out.push_str("(<age> ago)");
        rest = &rest[end + 5..];
    }
    out + rest
}

/// Compares with `tests/snapshots/NAME.txt`.
pub fn snapshot(name: &str, text: &str) {
    let path = format!("{}/tests/snapshots/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    if std::env::var("SANGAM_SNAPSHOTS").is_ok() {
        std::fs::write(&path, text).unwrap();
    }
    let want = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        want, text,
        "{name}: run with SANGAM_SNAPSHOTS=write if this is meant\n{text}"
    );
}

/// Times, sizes of time and dates as `<time>` and `<date>`; everything else stays.
pub fn timeless(text: &str) -> String {
    let mut out = String::new();
    for line in text.split_inclusive('\n') {
        let words: Vec<&str> = line.split_inclusive(' ').collect();
        let mut i = 0;
        while i < words.len() {
            let word = words[i].trim_end_matches([' ', '\n']);
            let space = &words[i][word.len()..];
            let unit = words
                .get(i + 1)
                .map(|w| w.trim_end_matches([' ', '\n', ',', ')', ';', '.']));
            let number = word.trim_start_matches('(');
            if number.parse::<f64>().is_ok()
                && unit.is_some_and(|u| ["s", "m", "h", "d"].contains(&u))
            {
                if !out.ends_with("<time> ") {
                    out.push_str(&word[..word.len() - number.len()]);
                    out.push_str("<time> ");
                }
                let next = words[i + 1];
                let rest = &next[1..];
                if rest != " " || words.get(i + 2).is_none_or(|w| w.parse::<f64>().is_err()) {
                    out = out.trim_end().to_owned() + rest;
                }
                i += 2;
                continue;
            }
            let bare = number.trim_end_matches([')', ',', ';']);
            let kind = if bare.len() == 10 && bare.matches('-').count() == 2 {
                Some("<date>")
            } else if bare.len() == 8 && bare.matches(':').count() == 2 {
                Some("<clock>")
            } else {
                None
            };
            match kind {
                Some(kind) => out.push_str(&word.replace(bare, kind)),
                None => out.push_str(word),
            }
            out.push_str(space);
            i += 1;
        }
    }
    out
}
