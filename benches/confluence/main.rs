//! How fast, as ratios in one run, on real servers with the real daemon.
//!
//! `cargo bench --bench confluence` runs all cases and prints a table; names after `--` choose some,
//! `--scale 0.1` makes every case a tenth of its size, `--svg FILE` draws what has a target. Nothing is
//! asserted about time: the table says `ok` or `not ok` beside each target.
//!
//! `--draw docs/performance.md --svg FILE` measures nothing and draws the table of that document.

#![allow(clippy::unwrap_used, reason = "the harness is that of the tests")]

mod bare;
#[path = "../../tests/common/mod.rs"]
mod common;
mod cost;
mod drain;
mod flow;
mod meter;
mod picture;
mod table;
mod whole;

use table::Table;

const CASES: [&str; 12] = [
    "drain",
    "stamped",
    "edits",
    "apply",
    "latency",
    "far",
    "wire",
    "idle",
    "backlog",
    "growth",
    "first",
    "reconcile",
];

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test --benches` starts this too: without cargo's own flag there is nothing to do.
    if !args.iter().any(|a| a == "--bench") {
        println!("run it as `cargo bench --bench confluence`");
        return;
    }
    let mut chosen = Vec::new();
    let mut scale = 1.0;
    let mut picture = None;
    let mut document = None;
    let mut args = args.into_iter().filter(|a| a != "--bench");
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--scale" => {
                scale = args
                    .next()
                    .and_then(|s| s.parse().ok())
                    .expect("--scale takes a number");
            }
            "--svg" => picture = Some(args.next().expect("--svg takes a file")),
            "--draw" => document = Some(args.next().expect("--draw takes a file")),
            name if CASES.contains(&name) => chosen.push(name.to_owned()),
            other => {
                eprintln!("no case is called {other}; there are {}", CASES.join(", "));
                std::process::exit(2);
            }
        }
    }
    let text = match document {
        Some(file) => std::fs::read_to_string(file).expect("the document can be read"),
        None => measure(&chosen, scale).await,
    };
    if let Some(file) = picture {
        std::fs::write(file, picture::draw(&text)).expect("the picture can be written");
    }
}

/// Runs the chosen cases, or all, and prints the table; returns it.
async fn measure(chosen: &[String], scale: f64) -> String {
    let mut table = Table::default();
    for case in CASES {
        if !chosen.is_empty() && !chosen.iter().any(|c| c == case) {
            continue;
        }
        println!("{case}");
        match case {
            "drain" => drain::fast(&mut table, scale, false).await,
            "stamped" => drain::fast(&mut table, scale, true).await,
            "edits" => flow::edits(&mut table, scale).await,
            "apply" => flow::apply(&mut table, scale).await,
            "latency" => flow::latency(&mut table, scale).await,
            "far" => drain::far(&mut table, scale).await,
            "wire" => cost::wire(&mut table, scale).await,
            "idle" => cost::idle(&mut table, scale).await,
            "growth" => {
                drain::growth(&mut table, scale).await;
                whole::growth(&mut table, scale).await;
            }
            "first" => whole::first(&mut table, scale).await,
            "reconcile" => whole::reconcile(&mut table, scale).await,
            _ => cost::backlog(&mut table, scale).await,
        }
    }
    let text = table.markdown();
    println!("\n{text}");
    text
}
