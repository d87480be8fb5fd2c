use super::*;

const MINUTE: i64 = 60_000;

fn config() -> NotifyConfig {
    NotifyConfig {
        webhook: None,
        command: vec![],
        offline_after: Duration::from_secs(3600),
        min_interval: Duration::from_secs(900),
        heartbeat: None,
        heartbeat_interval: Duration::from_secs(60),
    }
}

fn calm(minute: i64) -> Outlook {
    Outlook {
        at: 1_700_000_000_000 + minute * MINUTE,
        capturing: true,
        ..Outlook::default()
    }
}

/// The names of what is told.
fn told(told: &mut Told, now: &Outlook) -> Vec<&'static str> {
    told.look(now, &config()).into_iter().map(|n| n.0).collect()
}

#[test]
fn an_outage_is_told_once_and_its_end_too() {
    let mut t = Told::default();
    let start = calm(0).at;
    let offline = |minute| Outlook {
        offline: Some((start, "no internet".into())),
        waiting: 3,
        ..calm(minute)
    };
    for (now, expected) in [
        (calm(0), vec![]),
        (offline(1), vec![]),
        (offline(59), vec![]),
        (offline(60), vec!["offline"]),
        (offline(61), vec![]),
        (offline(6000), vec![]),
        (calm(6001), vec!["online"]),
        (calm(6002), vec![]),
    ] {
        assert_eq!(told(&mut t, &now), expected, "{now:?}");
    }
    let mut after_a_restart = Told::default();
    assert_eq!(told(&mut after_a_restart, &offline(60)), ["offline"]);
    // The new process knows only since its own start that the link is away.
    let anew = Outlook {
        offline: Some((calm(70).at, String::new())),
        ..calm(70)
    };
    assert_eq!(told(&mut after_a_restart, &anew), [""; 0], "no repeat");
    assert_eq!(told(&mut after_a_restart, &calm(71)), ["online"]);
    let short = Outlook {
        offline: Some((calm(6010).at, String::new())),
        ..calm(6015)
    };
    assert_eq!(told(&mut t, &short), [""; 0], "a short one is no news");
    assert_eq!(told(&mut t, &calm(6016)), [""; 0]);
}

#[test]
fn conflicts_are_told_together_not_one_by_one() {
    let mut t = Told::default();
    let new = |minute, n: u64, newest: &str| Outlook {
        new_conflicts: n,
        open_conflicts: n + 1,
        newest: Some(newest.into()),
        ..calm(minute)
    };
    assert_eq!(told(&mut t, &new(0, 1, "a")), ["conflicts"]);
    assert_eq!(t.newest.as_deref(), Some("a"));
    assert_eq!(told(&mut t, &new(1, 4, "e")), [""; 0], "too soon");
    let news = t.look(&new(15, 7, "h"), &config());
    assert_eq!(
        news[0].2,
        "7 new conflicts found that need a decision; 8 open in all"
    );
    assert_eq!(told(&mut t, &calm(40)), [""; 0]);
}

#[test]
fn what_comes_and_goes_is_not_told_each_time() {
    let mut t = Told::default();
    let near = |minute, share| Outlook {
        queue_share: share,
        ..calm(minute)
    };
    for (now, expected) in [
        (near(0, 0.79), vec![]),
        (near(1, 0.8), vec!["queue"]),
        (near(2, 0.75), vec![]),
        (near(3, 0.81), vec![]),
        (near(4, 0.6), vec![]),
        (near(5, 0.9), vec![]), // within the quarter of an hour
        (near(17, 0.9), vec!["queue"]),
    ] {
        assert_eq!(told(&mut t, &now), expected, "{now:?}");
    }
}

#[test]
fn halts_limits_stuck_capture_and_verify() {
    let mut t = Told::default();
    let bad = |minute| Outlook {
        halted: vec!["collection bookings was dropped".into()],
        degraded: Some("the disk is full".into()),
        capturing: false,
        verified: Some((5, 2)),
        ..calm(minute)
    };
    assert_eq!(told(&mut t, &bad(0)), ["degraded", "halted", "verify"]);
    assert_eq!(told(&mut t, &bad(4)), [""; 0]);
    assert_eq!(told(&mut t, &bad(5)), ["capture"], "after five minutes");
    let mut clean = calm(30);
    clean.verified = Some((9, 0));
    assert_eq!(told(&mut t, &clean), [""; 0], "equal is no news");
}
