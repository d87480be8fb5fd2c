//! The table of what was measured.

use std::fmt;
use std::time::Duration;

/// What a figure is held against.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// At least so much.
    AtLeast(f64),
    /// Less than so much.
    Below(f64),
    /// Only shown.
    None,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(x) => write!(f, "≥ {x}"),
            Self::Below(x) => write!(f, "< {x}"),
            Self::None => Ok(()),
        }
    }
}

struct Row {
    case: String,
    figure: String,
    ratio: String,
    target: Target,
    verdict: &'static str,
}

/// Rows in the order they were measured.
#[derive(Default)]
pub(crate) struct Table {
    rows: Vec<Row>,
}

impl Table {
    /// A figure without a target.
    pub(crate) fn note(&mut self, case: impl Into<String>, figure: impl Into<String>) {
        self.push(case, figure, String::new(), f64::NAN, Target::None);
    }

    /// How many times the rate `than` the rate `ours` is.
    pub(crate) fn ratio(
        &mut self,
        case: impl Into<String>,
        ours: Rate,
        than: Rate,
        target: Target,
    ) {
        let ratio = ours.per_second() / than.per_second();
        self.push(
            case,
            format!("{ours} against {than}"),
            format!("{ratio:.2}"),
            ratio,
            target,
        );
    }

    /// A figure with a unit.
    pub(crate) fn figure(
        &mut self,
        case: impl Into<String>,
        value: f64,
        unit: &str,
        target: Target,
    ) {
        self.push(
            case,
            format!("{value:.2} {unit}"),
            String::new(),
            value,
            target,
        );
    }

    fn push(
        &mut self,
        case: impl Into<String>,
        figure: impl Into<String>,
        ratio: String,
        value: f64,
        target: Target,
    ) {
        let verdict = match target {
            Target::AtLeast(x) if value >= x => "ok",
            Target::Below(x) if value < x => "ok",
            Target::None => "",
            _ => "not ok",
        };
        let row = Row {
            case: case.into(),
            figure: figure.into(),
            ratio,
            target,
            verdict,
        };
        println!(
            "   {}: {} {} {}",
            row.case, row.figure, row.ratio, row.verdict
        );
        self.rows.push(row);
    }

    /// The table in Markdown.
    pub(crate) fn markdown(&self) -> String {
        let mut text =
            String::from("| case | figure | ratio | target | |\n|---|---|---|---|---|\n");
        for row in &self.rows {
            text += &format!(
                "| {} | {} | {} | {} | {} |\n",
                row.case, row.figure, row.ratio, row.target, row.verdict
            );
        }
        text
    }
}

/// Documents in a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    /// How many.
    pub(crate) documents: u64,
    /// In how long.
    pub(crate) took: Duration,
}

impl Rate {
    /// Whichever took longer.
    pub(crate) fn slower(self, other: Self) -> Self {
        if self.took > other.took { self } else { other }
    }

    /// Documents a second.
    pub(crate) fn per_second(self) -> f64 {
        self.documents as f64 / self.took.as_secs_f64()
    }
}

/// Both, one after the other.
impl std::ops::Add for Rate {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            documents: self.documents + other.documents,
            took: self.took + other.took,
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.per_second();
        if rate < 100.0 {
            write!(f, "{rate:.1}/s")
        } else {
            write!(f, "{rate:.0}/s")
        }
    }
}
