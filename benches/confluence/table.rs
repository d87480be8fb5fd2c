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
    value: f64,
    target: Target,
    verdict: &'static str,
}

impl Row {
    /// How many times better than its target a figure is; `None` without a target.
    fn margin(&self) -> Option<f64> {
        match self.target {
            Target::AtLeast(x) => Some(self.value / x),
            // A figure of zero is as good as can be drawn.
            Target::Below(x) => Some(x / self.value.max(x / 1000.0)),
            Target::None => None,
        }
    }
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
            value,
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
    pub(crate) fn print(&self) {
        println!("\n| case | figure | ratio | target | |\n|---|---|---|---|---|");
        for row in &self.rows {
            println!(
                "| {} | {} | {} | {} | {} |",
                row.case, row.figure, row.ratio, row.target, row.verdict
            );
        }
    }

    /// A picture of the figures that have a target: each a bar, as many times better than its target as
    /// it is long, on a scale where ten times is a step. The line is the target.
    pub(crate) fn svg(&self) -> String {
        const LEFT: f64 = 560.0;
        const STEP: f64 = 90.0;
        const HIGH: f64 = 22.0;
        let rows: Vec<(&Row, f64)> = self
            .rows
            .iter()
            .filter_map(|r| Some((r, r.margin()?.log10().clamp(-1.0, 3.0))))
            .collect();
        let height = HIGH * (rows.len() as f64 + 2.0);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 1020 {height}\" \
             font-family=\"sans-serif\" font-size=\"11\">\n\
             <style>text {{ fill: #222 }} @media (prefers-color-scheme: dark) {{ text {{ fill: #ddd }} }}</style>\n"
        );
        let one = LEFT + STEP;
        for (step, label) in [
            (-1.0, "a tenth"),
            (0.0, "target"),
            (1.0, "10 ×"),
            (2.0, "100 ×"),
        ] {
            let x = one + step * STEP;
            svg += &format!(
                "<line x1=\"{x}\" x2=\"{x}\" y1=\"{HIGH}\" y2=\"{height}\" stroke=\"#888\" \
                 stroke-dasharray=\"{}\"/><text x=\"{x}\" y=\"14\" text-anchor=\"middle\">{label}</text>\n",
                if step == 0.0 { "none" } else { "2 3" }
            );
        }
        for (n, (row, margin)) in rows.iter().enumerate() {
            let y = HIGH * (n as f64 + 1.5);
            let (x, wide) = (one + margin.min(0.0) * STEP, margin.abs() * STEP);
            let colour = if *margin >= 0.0 { "#2a7f62" } else { "#b5452c" };
            let figure = if row.ratio.is_empty() {
                &row.figure
            } else {
                &row.ratio
            };
            let case = row.case.replace('&', "&amp;").replace('<', "&lt;");
            svg += &format!(
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{case}: {figure} ({})</text>\
                 <rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{wide:.1}\" height=\"14\" fill=\"{colour}\"/>\n",
                LEFT - 8.0,
                y + 11.0,
                row.target.to_string().replace('<', "&lt;"),
            );
        }
        svg + "</svg>\n"
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
