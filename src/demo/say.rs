//! What the demo says: chapters, sentences, aligned figures, and one line that can change.
//!
//! Colours and the changing line are for terminals; piped, each line is written once and plain.

use std::cell::Cell;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use owo_colors::OwoColorize;

/// Columns that a line may take; sentences are broken before it.
const WIDTH: usize = 80;
/// Width of the bar in the changing line.
const BAR: usize = 28;

/// Where the story is told.
#[derive(Debug)]
pub(super) struct Voice {
    terminal: bool,
    /// Columns that the changing line takes at the moment.
    live: Cell<usize>,
}

impl Voice {
    /// Standard output.
    pub(super) fn new() -> Self {
        Self {
            terminal: std::io::stdout().is_terminal(),
            live: Cell::new(0),
        }
    }

    /// One line as it is; ends the changing line.
    pub(super) fn line(&self, text: &str) {
        self.write(&format!("{}{text}\n", self.wiped()));
    }

    /// An empty line.
    pub(super) fn gap(&self) {
        self.line("");
    }

    /// The name of what follows.
    pub(super) fn title(&self, text: &str, under: &str) {
        self.gap();
        self.line(&format!("  {}  {}", text.bold(), under.dimmed()));
        self.gap();
    }

    /// The heading of a chapter.
    pub(super) fn chapter(&self, number: u8, heading: &str) {
        self.gap();
        self.line(&format!(
            "{}  {}",
            number.to_string().cyan().bold(),
            heading.bold()
        ));
    }

    /// Sentences, broken into lines.
    pub(super) fn say(&self, text: &str) {
        for line in broken(text, WIDTH - 3) {
            self.line(&format!("   {line}"));
        }
    }

    /// Something came true.
    pub(super) fn good(&self, text: &str) {
        self.marked(&"✓".green().bold().to_string(), text);
    }

    /// Something did not.
    pub(super) fn bad(&self, text: &str) {
        self.marked(&"✗".red().bold().to_string(), text);
    }

    fn marked(&self, mark: &str, text: &str) {
        for (at, line) in broken(text, WIDTH - 5).iter().enumerate() {
            let mark = if at == 0 { mark } else { " " };
            self.line(&format!("   {mark} {line}"));
        }
    }

    /// Aligned columns; see [`columns`]. The heading, if it has text, is dimmed.
    pub(super) fn table(&self, heading: &[&str], rows: &[Vec<String>], right: &[usize]) {
        let mut all = vec![heading.iter().map(|&name| name.to_owned()).collect()];
        all.extend_from_slice(rows);
        let lines = columns(&all, right);
        for (at, line) in lines.iter().enumerate() {
            match at {
                0 if line.is_empty() => {}
                0 => self.line(&format!("     {}", line.dimmed())),
                _ => self.line(&format!("     {line}")),
            }
        }
    }

    /// A command to copy, and what it does.
    pub(super) fn command(&self, what: &str, command: &str) {
        self.line(&format!("     {what:<18} {}", command.cyan()));
    }

    /// Changes the changing line. Piped, nothing: the end of the matter is said by [`Voice::good`].
    pub(super) fn live(&self, text: &str) {
        if !self.terminal {
            return;
        }
        let line: String = format!("     {text}").chars().take(WIDTH - 1).collect();
        let width = line.chars().count();
        let rest = " ".repeat(self.live.replace(width).saturating_sub(width));
        self.write(&format!("\r{}{rest}", line.dimmed()));
    }

    /// The changing line as a bar.
    pub(super) fn progress(&self, done: u64, total: u64) {
        self.live(&format!(
            "{}  {} of {}",
            bar(done, total),
            thousands(done),
            thousands(total)
        ));
    }

    /// What clears the changing line.
    fn wiped(&self) -> String {
        match self.live.replace(0) {
            0 => String::new(),
            width => format!("\r{}\r", " ".repeat(width)),
        }
    }

    /// Nobody may be reading any more (`| head`): that's no reason to fail.
    fn write(&self, text: &str) {
        let mut out = anstream::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

/// Columns as wide as their widest cell, two spaces between; those in `right` are right-aligned.
fn columns(rows: &[Vec<String>], right: &[usize]) -> Vec<String> {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let line = |row: &Vec<String>| {
        let mut line = String::new();
        for (at, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            let between = if at == 0 { "" } else { "   " };
            // Writing to a String can't fail.
            let _ = if right.contains(&at) {
                write!(line, "{between}{cell:>width$}")
            } else {
                write!(line, "{between}{cell:<width$}")
            };
        }
        line.trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// Breaks text at spaces so that no line is longer than `width` (a longer word stays whole).
fn broken(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.len() - 1;
        let used = lines[last].chars().count();
        if used > 0 && used + 1 + word.chars().count() > width {
            lines.push(word.to_owned());
        } else {
            if used > 0 {
                lines[last].push(' ');
            }
            lines[last].push_str(word);
        }
    }
    lines
}

fn bar(done: u64, total: u64) -> String {
    let share = done.min(total) as f64 / total.max(1) as f64;
    let full = (share * BAR as f64) as usize;
    format!("{}{}", "━".repeat(full), "─".repeat(BAR - full))
}

/// `12,345`.
pub(super) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `38 ms`, `1.4 s`, `2 min 5 s`.
pub(super) fn time(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match seconds {
        ..0.9995 => format!("{} ms", duration.as_micros().div_ceil(1000)),
        ..59.95 => format!("{seconds:.1} s"),
        _ => format!(
            "{} min {} s",
            duration.as_secs() / 60,
            duration.as_secs() % 60
        ),
    }
}

/// `1 document`, `2,000 documents`.
pub(super) fn count(number: u64, noun: &str) -> String {
    let s = if number == 1 { "" } else { "s" };
    format!("{} {noun}{s}", thousands(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_times_read_as_people_write_them() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1_000), "1,000");
        assert_eq!(thousands(12_345_678), "12,345,678");
        assert_eq!(count(1, "document"), "1 document");
        assert_eq!(count(4_186, "document"), "4,186 documents");
        assert_eq!(time(Duration::from_micros(300)), "1 ms");
        assert_eq!(time(Duration::from_micros(38_400)), "39 ms");
        assert_eq!(time(Duration::from_millis(1_449)), "1.4 s");
        assert_eq!(time(Duration::from_secs(125)), "2 min 5 s");
    }

    #[test]
    fn columns_are_aligned_by_characters_not_bytes() {
        let row = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        let lines = columns(
            &[row("", "count"), row("März", "7"), row("June", "1,200")],
            &[1],
        );
        assert_eq!(lines, ["       count", "März       7", "June   1,200"]);
    }

    #[test]
    fn sentences_break_between_words() {
        assert_eq!(broken("one two three", 7), ["one two", "three"]);
        assert_eq!(broken("averylongword x", 4), ["averylongword", "x"]);
        assert_eq!(broken("", 10), [""]);
    }

    #[test]
    fn the_bar_keeps_its_length() {
        for (done, total) in [(0, 0), (0, 10), (5, 10), (10, 10), (99, 10)] {
            assert_eq!(bar(done, total).chars().count(), BAR);
        }
        assert_eq!(bar(10, 10), "━".repeat(BAR));
    }
}
