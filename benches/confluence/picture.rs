//! The picture of a table in Markdown: how far each figure is from its target.
//!
//! It is drawn from the text, so that it shows what the document says and nothing else.

/// What a row with a target says.
struct Bar<'a> {
    case: &'a str,
    /// The ratio, where there is one.
    figure: &'a str,
    target: &'a str,
    /// How many times better than its target it is, as a power of ten; of several the worst.
    margin: f64,
}

/// The first table of five columns in `markdown` (case, figure, ratio, target, verdict), as an SVG: each
/// row that has a target is a bar, on a scale where a step is ten times. The line is the target.
pub(crate) fn draw(markdown: &str) -> String {
    const LEFT: f64 = 760.0;
    const STEP: f64 = 85.0;
    const HIGH: f64 = 24.0;
    const WIDE: f64 = 1130.0;
    let bars: Vec<Bar> = markdown.lines().filter_map(bar).collect();
    let height = HIGH * (bars.len() as f64 + 2.0);
    let one = LEFT + STEP;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDE} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <title>How many times better than its target each figure is</title>\n\
         <style>text {{ fill: #222 }} .paper {{ fill: #fff }} .miss {{ fill: #b5452c }} .meet {{ fill: #2a7f62 }} \
         line {{ stroke: #888 }} @media (prefers-color-scheme: dark) {{ text {{ fill: #ddd }} \
         .paper {{ fill: #16191d }} .miss {{ fill: #e0714f }} .meet {{ fill: #4caf8d }} }}</style>\n\
         <rect class=\"paper\" width=\"{WIDE}\" height=\"{height}\"/>\n"
    );
    for (step, label) in [
        (-1.0, "a tenth"),
        (0.0, "target"),
        (1.0, "10 ×"),
        (2.0, "100 ×"),
        (3.0, "1000 ×"),
    ] {
        let x = one + step * STEP;
        let dashes = if step == 0.0 { "none" } else { "2 3" };
        svg += &format!(
            "<line x1=\"{x}\" x2=\"{x}\" y1=\"{HIGH}\" y2=\"{height}\" stroke-dasharray=\"{dashes}\"/>\
             <text x=\"{x}\" y=\"15\" text-anchor=\"middle\">{label}</text>\n"
        );
    }
    for (n, bar) in bars.iter().enumerate() {
        let y = HIGH * (n as f64 + 1.5);
        let (x, wide) = (one + bar.margin.min(0.0) * STEP, bar.margin.abs() * STEP);
        let class = if bar.margin >= 0.0 { "meet" } else { "miss" };
        let text = format!("{}: {} ({})", bar.case, bar.figure, bar.target);
        svg += &format!(
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
             <rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{wide:.1}\" height=\"15\"/>\n",
            LEFT - 10.0,
            y + 12.0,
            escaped(&text)
        );
    }
    svg + "</svg>\n"
}

fn bar(line: &str) -> Option<Bar<'_>> {
    let cells: Vec<&str> = line.strip_prefix('|')?.split('|').map(str::trim).collect();
    let [case, figure, ratio, target, _, ""] = cells[..] else {
        return None;
    };
    let figure = if ratio.is_empty() { figure } else { ratio };
    let (found, wanted) = (numbers(figure), numbers(target));
    let more = target.starts_with('≥');
    let margins = found.iter().zip(&wanted).map(|(found, wanted)| {
        let times = if more { found / wanted } else { wanted / found };
        // A figure of nothing is as good as can be drawn.
        times.log10().clamp(-1.0, 3.2)
    });
    Some(Bar {
        case,
        figure,
        target,
        margin: margins.reduce(f64::min)?,
    })
}

/// All numbers of a text, `3,470` as one.
fn numbers(text: &str) -> Vec<f64> {
    let words = text.split(|c: char| c.is_whitespace() || c == '/');
    let number = |word: &str| word.trim_end_matches(',').replace(',', "").parse().ok();
    words.filter_map(number).collect()
}

fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    text.replace('`', "")
}
