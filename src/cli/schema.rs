//! `sangam schema`: how indexes and options of the two databases differ.

use std::process::ExitCode;

use owo_colors::OwoColorize;

use super::table::table;
use super::{Failure, Output};
use crate::client::Client;
use crate::schema::{FindingKind, Report};

pub(super) async fn schema(
    client: Client,
    create: bool,
    output: Output,
) -> Result<ExitCode, Failure> {
    let report: Report = client
        .post(
            "/api/sync/schema",
            Some(serde_json::json!({ "create": create })),
        )
        .await?;
    output.answer(&report, || text(&report));
    Ok(if report.findings.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(3)
    })
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    if report.findings.is_empty() && report.building.is_empty() {
        text += &format!("{}\n", "both sides have the same indexes".green());
    }
    if !report.findings.is_empty() {
        let rows = report.findings.iter().map(|f| {
            vec![
                f.collection.clone(),
                f.index.clone().unwrap_or_default(),
                f.side.map_or("both", |s| s.name()).to_owned(),
                word(f.kind).to_owned(),
                f.detail.clone(),
            ]
        });
        text += &table(&["collection", "index", "side", "what", "detail"], rows);
        text.push('\n');
    }
    for b in &report.building {
        text += &format!(
            "{} {}.{} is being built on the {} side\n",
            "*".cyan(),
            b.collection,
            b.index,
            b.side.name()
        );
    }
    text
}

fn word(kind: FindingKind) -> &'static str {
    match kind {
        FindingKind::Missing => "missing",
        FindingKind::Dropped => "dropped",
        FindingKind::Differs => "differs",
        FindingKind::Refused => "refused",
        FindingKind::WouldExpire => "held",
        FindingKind::Options => "options",
        FindingKind::NoPullIndex => "slow pull",
    }
}
