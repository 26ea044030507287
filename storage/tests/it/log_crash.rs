//! The crash property: many random histories, and proof that it can fail. Does not test damage (see
//! `log_damage`).

use coracle_storage::log::testing::{HistoryReport, run_history};
use coracle_storage::options::Sabotage;

const HISTORIES_DEFAULT: u64 = 500;

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {value:?}")))
}

/// `CORACLE_LOG_HISTORIES` sets how many, `CORACLE_SEED` runs the one of that seed.
#[test]
fn after_any_crash_the_log_holds_a_first_part_with_all_that_was_acknowledged() {
    if let Some(seed) = number("CORACLE_SEED") {
        let report = run_history(seed, None).unwrap_or_else(|why| panic!("{why}"));
        println!("{report:?}");
        return;
    }
    let mut sum = HistoryReport::default();
    let histories = number("CORACLE_LOG_HISTORIES").unwrap_or(HISTORIES_DEFAULT);
    for seed in 0..histories {
        let report = run_history(seed, None)
            .unwrap_or_else(|why| panic!("{why}\nCORACLE_SEED={seed} runs this history alone"));
        sum.submitted += report.submitted;
        sum.acknowledged += report.acknowledged;
        sum.crashes += report.crashes;
        sum.crashes_in_open += report.crashes_in_open;
        sum.freed += report.freed;
        sum.kept_unacknowledged += report.kept_unacknowledged;
        sum.torn_bytes += report.torn_bytes;
    }
    println!("{sum:?}");
    // Histories that do not get to these places would pass without saying anything.
    assert!(sum.acknowledged > histories * 10, "{sum:?}");
    assert!(sum.crashes > histories, "{sum:?}");
    assert!(sum.crashes_in_open > histories / 50, "{sum:?}");
    assert!(sum.freed > histories, "{sum:?}");
    assert!(sum.kept_unacknowledged > histories / 20, "{sum:?}");
    assert!(sum.torn_bytes > histories, "{sum:?}");
}

#[test]
fn each_sabotage_is_caught_within_500_histories() {
    for sabotage in [Sabotage::AckBeforeSync, Sabotage::LostVote, Sabotage::ForgottenTruncate] {
        let caught = (0..500).find_map(|seed| run_history(seed, Some(sabotage)).err());
        println!("{sabotage:?}: {caught:?}");
        assert!(caught.is_some(), "{sabotage:?} was not caught");
    }
}
