use std::collections::BTreeSet;

use super::*;
use crate::command::LinkStatus;

fn status() -> Status {
    Status {
        last_sync_time: None,
        last_sync_status: None,
        last_sync_duration: None,
        total_syncs_completed: 0,
        total_conflicts: 0,
        unresolved_conflicts: 0,
        pending_documents: 0,
        pending_inbox: 0,
        held_documents: 0,
        failed_documents: 0,
        is_online: true,
        is_syncing: false,
        is_configured: true,
        ha: None,
        is_paused: false,
        is_capturing: true,
        is_following: true,
        link: LinkStatus {
            state: "online".into(),
            since: chrono::Utc::now(),
            reason: None,
            message: None,
            next_probe: None,
            last_check: None,
        },
        lag_seconds: 0.0,
        oldest_unsynced: None,
        clock_skew: Some(-1500),
        current_run: None,
        progress: None,
        last_proof: None,
        last_verify: None,
        notices: vec![],
        databases: vec![],
        site: "local".into(),
        version: "1".into(),
    }
}

fn text() -> String {
    let metrics = Metrics::default();
    metrics.moved(Side::Remote, 100, &[70]);
    metrics.batch(3, Duration::from_millis(20));
    let vitals = Vitals {
        free_disk: Some(5),
        disk_reserve: 7,
        ..Vitals::default()
    };
    metrics.render(&status(), &vitals)
}

/// Name, kind, labels and meaning of every metric, as a table.
fn documented() -> String {
    let text = text();
    let mut page = "# Metrics\n\n\
        `GET /metrics` in OpenMetrics text, which Prometheus reads. Made from the code; a test keeps it true.\n\n\
        | metric | kind | labels | meaning |\n|---|---|---|---|\n"
        .to_owned();
    let after = |line: &str, what: &str| line.strip_prefix(what).map(str::to_owned);
    for line in text.lines().filter_map(|l| after(l, "# HELP ")) {
        let (name, help) = line.split_once(' ').unwrap();
        let kind = text
            .lines()
            .find_map(|l| after(l, &format!("# TYPE {name} ")))
            .unwrap();
        let shown = match kind.as_str() {
            "counter" => format!("{name}_total"),
            _ => name.to_owned(),
        };
        let mut labels: BTreeSet<&str> = BTreeSet::new();
        for sample in text.lines().filter(|l| l.starts_with(name)) {
            let rest =
                sample[name.len()..].trim_start_matches(|c: char| c == '_' || c.is_alphabetic());
            let Some(inside) = rest.strip_prefix('{').and_then(|r| r.split_once('}')) else {
                continue;
            };
            labels.extend(
                inside
                    .0
                    .split(',')
                    .filter_map(|l| l.split_once('='))
                    .map(|l| l.0),
            );
        }
        labels.remove("le");
        let labels: Vec<String> = labels.iter().map(|l| format!("`{l}`")).collect();
        page += &format!("| `{shown}` | {kind} | {} | {help} |\n", labels.join(", "));
    }
    page += "\n`direction` is `local_to_remote` or `remote_to_local`, `database` is `local` or `remote`.\n\n\
        Prometheus itself tells whether Sangam runs: `up`. A scrape with a token:\n\n\
        ```yaml\nscrape_configs:\n  - job_name: sangam\n    authorization:\n      credentials_file: /etc/prometheus/sangam-token\n\
        \x20   static_configs:\n      - targets: [\"127.0.0.1:8840\"]\n```\n\n\
        In `monitoring/` are alert rules and a dashboard for Grafana.\n";
    page
}

#[test]
fn every_metric_is_documented() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
    if std::env::var_os("SANGAM_WRITE_DOCS").is_some() {
        std::fs::write(file, documented()).unwrap();
    }
    let written = std::fs::read_to_string(file).unwrap_or_default();
    assert_eq!(
        written,
        documented(),
        "write it anew: SANGAM_WRITE_DOCS=1 cargo test --lib metrics"
    );
}

#[test]
fn alerts_and_dashboard_name_only_metrics_that_exist() {
    let text = text();
    let samples: BTreeSet<&str> = text
        .lines()
        .filter(|l| l.starts_with("sangam_"))
        .filter_map(|l| l.split([' ', '{']).next())
        .collect();
    for (file, least) in [("alerts.yml", 10), ("grafana.json", 15)] {
        let path = format!("{}/monitoring/{file}", env!("CARGO_MANIFEST_DIR"));
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        let is_name = |c: char| c == '_' || c.is_ascii_alphanumeric();
        let named: BTreeSet<&str> = written
            .split(|c| !is_name(c))
            .filter(|w| w.starts_with("sangam_"))
            .collect();
        assert!(named.len() >= least, "{file} names {} metrics", named.len());
        for name in named {
            assert!(samples.contains(name), "{file}: there is no metric {name}");
        }
        // `name{label="value"}`, apart from the labels that Prometheus adds.
        let written = written.replace("\\\"", "\"");
        for (before, rest) in written
            .match_indices('{')
            .map(|(at, _)| written.split_at(at))
        {
            let name = before.rsplit(|c| !is_name(c)).next().unwrap();
            let labels = rest[1..].split('}').next().unwrap();
            for label in labels.split(',').map(str::trim) {
                let exact = label.split_once("=\"").filter(|(key, _)| {
                    key.chars().all(is_name) && !["job", "instance"].contains(key)
                });
                if name.starts_with("sangam_") && exact.is_some() {
                    let has = |l: &str| l.starts_with(&format!("{name}{{")) && l.contains(label);
                    assert!(text.lines().any(has), "{file}: {name} never has {label}");
                }
            }
        }
    }
}

#[test]
fn the_dashboard_for_grafana_can_be_imported_for_any_number_of_sites() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/monitoring/grafana.json");
    let board: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(
        board["id"],
        serde_json::Value::Null,
        "an id is given by Grafana"
    );
    let panels = board["panels"].as_array().unwrap();
    let mut ids = BTreeSet::new();
    let mut cells = BTreeSet::new();
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
        let place = |what: &str| panel["gridPos"][what].as_u64().unwrap();
        assert!(place("x") + place("w") <= 24, "{panel}");
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                assert!(cells.insert((x, y)), "lies over another: {panel}");
            }
        }
        let targets = panel["targets"].as_array();
        assert!(panel["type"] == "row" || targets.is_some_and(|t| !t.is_empty()));
        for target in targets.into_iter().flatten() {
            let expr = target["expr"].as_str().unwrap();
            assert_eq!(
                expr.matches("sangam_").count(),
                expr.matches("{job=\"$job\",instance=~\"$instance\"")
                    .count(),
                "not of the chosen sites alone: {expr}"
            );
        }
        assert_eq!(panel["datasource"]["uid"].as_str(), Some("${datasource}"));
    }
}

#[test]
fn every_series_begins_with_zero_and_counts() {
    let text = text();
    for line in [
        "sangam_documents_total{direction=\"local_to_remote\"} 1",
        "sangam_documents_total{direction=\"remote_to_local\"} 0",
        "sangam_document_bytes_total{direction=\"local_to_remote\"} 100",
        "sangam_conflicts_total{kind=\"unique_field\"} 0",
        "sangam_batch_documents_bucket{le=\"4.0\"} 1",
        "sangam_clock_skew_seconds -1.5",
        "sangam_disk_headroom_bytes -2.0",
        "sangam_link_state{state=\"online\"} 1.0",
        "sangam_link_state{state=\"offline\"} 0.0",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
}
