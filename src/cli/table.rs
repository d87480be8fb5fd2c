//! Aligned columns without lines: readable on a terminal, and easy to cut when piped.

use std::io::IsTerminal;

use comfy_table::{ContentArrangement, Table, presets};

/// A table with a heading. On a terminal long cells wrap; piped, each row stays one line.
pub(super) fn table(heading: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(heading.iter().map(|name| name.to_uppercase()));
    table.set_content_arrangement(if std::io::stdout().is_terminal() {
        ContentArrangement::Dynamic
    } else {
        ContentArrangement::Disabled
    });
    for row in rows {
        // A line break in a value would tear the row.
        table.add_row(row.into_iter().map(|cell| cell.replace(['\n', '\r'], " ")));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// `label  value` lines; the labels aligned.
pub(super) fn pairs(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(label, _)| label.len()).max().unwrap_or(0) + 2;
    rows.iter()
        .map(|(label, value)| format!("{label:width$}{value}\n"))
        .collect()
}
