//! What the real binary says to a bad configuration: one paragraph with cause and remedy, exit code
//! 78, nothing touched, and never a secret.

use std::path::Path;

use assert_cmd::Command;

/// `sangam` in an empty folder, without the variables of whoever runs the tests.
fn sangam(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sangam"));
    command
        .current_dir(folder)
        .env_clear()
        .env("PATH", "")
        .env("HOME", folder);
    command
}

/// Standard error of a command that must end with `code`.
fn stderr_of(command: &mut Command, code: i32) -> String {
    let output = command.assert().code(code).get_output().clone();
    assert_eq!(output.stdout, b"");
    String::from_utf8(output.stderr).unwrap()
}

/// What `sangam run` says to this `sangam.toml`, which it must refuse.
fn refused(toml: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("sangam.toml"), toml).unwrap();
    let stderr = stderr_of(sangam(folder.path()).arg("run"), 78);
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        1,
        "something was created"
    );
    assert!(stderr.starts_with("error: "), "{stderr}");
    assert_eq!(
        stderr.trim_end().lines().count(),
        1,
        "one paragraph: {stderr}"
    );
    stderr
}

#[test]
fn a_bad_value_names_file_line_key_and_remedy() {
    for (toml, expected) in [
        (
            "[sync]\nbatchsize = 5",
            &["sangam.toml, line 3: ", "did you mean `sync.batch_size`?"][..],
        ),
        (
            "[sync]\nbatch_size = \"many\"",
            &["line 3", "a whole number from 1 to 10000", "is a text"],
        ),
        (
            "[probe]\ninterval = \"soon\"",
            &["line 3", "`probe.interval`", "\"30s\""],
        ),
        (
            "[probe]\ninterval = \"99999d\"",
            &["line 3", "must be from 100ms to 1d"],
        ),
        ("[sync]\nmass_delete_percent = 300", &["from 0 to 100"]),
        (
            "[api]\nlisten = \"0.0.0.0:1\"",
            &["line 3", "SANGAM_API_TOKEN"],
        ),
        ("[sync]\ncollections = [\"a[\"]", &["bad pattern"]),
        (
            "[remote]\nuri = \"postgres://u:s3cret@h/\"",
            &["line 3", "mongodb+srv://"],
        ),
        (
            "remote = \"mongodb://u:s3cret@h/\"",
            &["`remote` must be a section"],
        ),
        ("[remote\n", &["line 2", "not TOML"]),
    ] {
        let stderr = refused(&format!("database = \"d\"\n{toml}"));
        for part in expected {
            assert!(stderr.contains(part), "{toml}: {part} not in {stderr}");
        }
        assert!(!stderr.contains("s3cret"), "{stderr}");
    }
    let unnamed = refused("");
    assert!(
        unnamed.contains("no database is named") && unnamed.contains("DATABASE_NAME"),
        "{unnamed}"
    );
}

#[test]
fn a_bad_environment_names_the_variable_and_no_secret() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = sangam(folder.path());
    command
        .env("DATABASE_NAME", "d")
        .env("MONGODB_CLOUD_URL", "mongodb://u:s3cret@@h/");
    let stderr = stderr_of(command.arg("run"), 78);
    assert!(
        stderr.contains("MONGODB_CLOUD_URL") && stderr.contains("%40"),
        "{stderr}"
    );
    assert!(!stderr.contains("s3cret"), "{stderr}");
}

#[test]
fn a_missing_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let stderr = stderr_of(
        sangam(folder.path()).args(["--config", "nowhere.toml", "run"]),
        78,
    );
    assert!(stderr.contains("nowhere.toml can't be read"), "{stderr}");
}

#[test]
fn errors_are_json_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let stderr = stderr_of(sangam(folder.path()).args(["--json", "status"]), 78);
    let error: serde_json::Value = serde_json::from_str(&stderr).unwrap();
    assert_eq!(error["exitCode"], 78);
    assert!(error["detail"].as_str().unwrap().contains("no database"));
}

#[test]
fn wrong_usage_is_2() {
    let folder = tempfile::tempdir().unwrap();
    for args in [
        &["nonsense"][..],
        &["queue", "--limit", "0"],
        &["sync", "--collections"],
        &[],
    ] {
        sangam(folder.path()).args(args).assert().code(2);
    }
}

#[test]
fn without_a_daemon_questions_exit_with_69_and_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let toml = format!("database = \"d\"\n[api]\nlisten = \"127.0.0.1:{port}\"\n");
    std::fs::write(folder.path().join("sangam.toml"), toml).unwrap();
    for command in ["status", "queue", "logs", "pause", "resume", "reconcile"] {
        let stderr = stderr_of(sangam(folder.path()).arg(command), 69);
        assert!(stderr.contains("is the daemon running?"), "{stderr}");
    }
}

#[test]
fn config_shows_values_their_origin_and_no_secret() {
    let folder = tempfile::tempdir().unwrap();
    let toml = "database = \"d\"\n[sync]\nbatch_size = 7\n[notify]\ncommand = [\"/bin/tell\", \"--key=s3cret\"]\n";
    let dotenv = "MONGODB_CLOUD_URL=mongodb://u:s3cret@cloud.example/\n";
    std::fs::write(folder.path().join("sangam.toml"), toml).unwrap();
    std::fs::write(folder.path().join(".env"), dotenv).unwrap();
    let run = |args: &[&str]| {
        let mut command = sangam(folder.path());
        command.env("SANGAM_API_TOKEN", "s3cret").args(args);
        String::from_utf8(command.assert().code(0).get_output().stdout.clone()).unwrap()
    };
    let list = run(&["config"]);
    for part in [
        "file, line 3",
        "environment, SANGAM_API_TOKEN",
        "mongodb://***@cloud.example/",
        ".env, MONGODB_CLOUD_URL",
        "/bin/tell, ***",
    ] {
        assert!(list.contains(part), "{part}: {list}");
    }
    assert!(!list.contains('\u{1b}'), "no colours when piped");
    assert_eq!(run(&["config", "get", "sync.batch_size"]), "7\n");
    let json: serde_json::Value = serde_json::from_str(&run(&["--json", "config"])).unwrap();
    let settings = json["settings"].as_array().unwrap();
    assert!(
        settings
            .iter()
            .any(|s| s["key"] == "sync.batch_size" && s["value"] == 7)
    );
    assert!(!format!("{list}{json}").contains("s3cret"));
    sangam(folder.path())
        .args(["config", "get", "sync.size"])
        .assert()
        .code(2);
}
