//! `sangam doctor`: what was found, for a person.

use std::process::ExitCode;

use owo_colors::OwoColorize;

use super::{Failure, Output};
use crate::client::Client;
use crate::config::Loaded;
use crate::doctor::{Finding, Level, examine};
use crate::words;

pub(super) async fn doctor(
    loaded: &Loaded,
    client: Client,
    output: Output,
) -> Result<ExitCode, Failure> {
    let report = Box::pin(examine(loaded, &client)).await;
    output.answer(&report, || text(&report.findings));
    Ok(ExitCode::from(match report.worst() {
        Level::Good => 0,
        Level::Warning => 3,
        Level::Problem => 1,
    }))
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    let mut check = "";
    for finding in findings {
        let label = if finding.check == check {
            ""
        } else {
            &finding.check
        };
        check = &finding.check;
        let mark = match finding.level {
            Level::Good => format!("{}", "ok".green()),
            Level::Warning => format!("{}", "! ".yellow().bold()),
            Level::Problem => format!("{}", "x ".red().bold()),
        };
        text += &format!("{label:11}{mark}  {}\n", finding.what);
        if !finding.why.is_empty() {
            text += &format!("               why:  {}\n", finding.why);
        }
        for (i, line) in finding.fix.iter().enumerate() {
            let head = if i == 0 { "type:" } else { "     " };
            text += &format!("               {head} {line}\n");
        }
    }
    let count = |level| findings.iter().filter(|f| f.level == level).count() as u64;
    text += &format!(
        "\n{}, {}\n",
        words::count(count(Level::Problem), "problem"),
        words::count(count(Level::Warning), "warning")
    );
    text
}
