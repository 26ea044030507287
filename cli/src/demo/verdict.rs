//! Owns the tour's verdict: what it must have shown, and what it says when it has not. A plain function
//! of the figures. Measures nothing.

use std::time::Duration;

use crate::output::{count, duration};

use super::dataset::{Compared, RECORDS_MIN};
use super::load::Verified;

/// Acknowledged writes below which a tour proves too little.
pub const WRITES_MIN: u64 = 10_000;

/// What a tour has measured.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Records read back after the import.
    pub imported: Compared,
    /// The same after the failover.
    pub imported_after: Compared,
    /// The load's ledger, read back.
    pub verified: Verified,
    /// Reads under load that found an acknowledged write missing.
    pub lost_under_load: u64,
    /// Writes to shards of the killed node that were unanswered when it was killed, and still after.
    pub in_flight_at_kill: usize,
    /// Shards that the killed node led.
    pub shards_led: usize,
    /// From the kill to the first acknowledged write on one of them; `None`: there was none.
    pub failover_first: Option<Duration>,
    /// To the first on the last of them; `None`: not on all.
    pub failover_last: Option<Duration>,
    /// From its restart until the killed node had caught up.
    pub caught_up: Duration,
}

impl Figures {
    /// Acknowledged writes that were not there.
    pub fn lost(&self) -> u64 {
        self.verified.lost.len() as u64 + self.lost_under_load + self.imported_after.wrong_count
    }

    /// What was not shown. Empty: the tour has passed.
    pub fn shortcomings(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut expect = |holds: bool, text: String| {
            if !holds {
                wrong.push(text);
            }
        };
        expect(self.lost() == 0, format!("{} acknowledged writes were lost", count(self.lost())));
        let differ = self.imported.wrong_count;
        expect(differ == 0, format!("{} records were not read back as written", count(differ)));
        expect(
            self.imported.equal >= RECORDS_MIN as u64,
            format!("only {} records, at least {RECORDS_MIN} are wanted", self.imported.equal),
        );
        expect(
            self.verified.acknowledged >= WRITES_MIN,
            format!(
                "only {} acknowledged writes, at least {WRITES_MIN} are wanted",
                self.verified.acknowledged
            ),
        );
        expect(self.in_flight_at_kill > 0, "no write was in flight at the kill".to_owned());
        expect(
            self.failover_last.is_some(),
            "not every shard of the killed node took a write again".to_owned(),
        );
        wrong
    }

    /// The block at the end.
    pub fn block(&self) -> String {
        let seconds = |span: Option<Duration>| {
            span.map_or_else(|| "never".to_owned(), |span| format!("{:.2} s", span.as_secs_f64()))
        };
        let Verified { keys, acknowledged, unknown, unknown_applied, .. } = self.verified;
        let mut lines = vec![
            format!("records imported and compared   {}", count(self.imported.equal)),
            format!(
                "acknowledged writes checked     {} on {} keys",
                count(acknowledged),
                count(keys)
            ),
            format!("acknowledged writes lost        {}", count(self.lost())),
            format!("writes of unknown outcome       {unknown}, {unknown_applied} of them applied"),
            format!("writes in flight at the kill    {}", self.in_flight_at_kill),
            format!(
                "failover time                   {} to the first write, {} on all {} shards",
                seconds(self.failover_first),
                seconds(self.failover_last),
                self.shards_led
            ),
            format!("caught up after the restart     {}", duration(self.caught_up)),
        ];
        lines.extend(self.verified.lost.iter().take(10).map(|loss| format!("LOST  {loss}")));
        let wrong = self.imported.wrong.iter().chain(&self.imported_after.wrong);
        lines.extend(wrong.map(|wrong| format!("WRONG {wrong}")));
        let shortcomings = self.shortcomings();
        lines.push(match shortcomings.is_empty() {
            true => "PASS".to_owned(),
            false => format!("FAIL: {}", shortcomings.join("; ")),
        });
        lines.iter().map(|line| format!("  {line}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Figures {
        Figures {
            imported: Compared { equal: 1_000, ..Compared::default() },
            verified: Verified { acknowledged: 10_000, keys: 10, ..Verified::default() },
            in_flight_at_kill: 1,
            failover_first: Some(Duration::from_millis(610)),
            failover_last: Some(Duration::from_millis(900)),
            ..Figures::default()
        }
    }

    #[test]
    fn a_tour_that_showed_everything_passes() {
        assert_eq!(good().shortcomings(), Vec::<String>::new());
        let block = good().block();
        assert!(block.contains("PASS") && block.contains("0.61 s"), "{block}");
    }

    #[test]
    fn each_shortcoming_fails_it() {
        type Spoil = fn(&mut Figures);
        let cases: [(&str, Spoil); 9] = [
            ("1 acknowledged writes were lost", |figures| figures.lost_under_load = 1),
            ("were lost", |figures| figures.verified.lost.push("key".to_owned())),
            ("were lost", |figures| figures.imported_after.wrong_count = 1),
            ("read back", |figures| figures.imported.wrong_count = 1),
            ("only 999 records", |figures| figures.imported.equal = 999),
            ("only 9999 acknowledged", |figures| figures.verified.acknowledged = 9_999),
            ("in flight", |figures| figures.in_flight_at_kill = 0),
            ("took a write again", |figures| figures.failover_last = None),
            ("were lost", |figures| figures.lost_under_load = u64::from(u32::MAX)),
        ];
        for (what, spoil) in cases {
            let mut figures = good();
            spoil(&mut figures);
            let shortcomings = figures.shortcomings();
            assert!(shortcomings.len() == 1 && shortcomings[0].contains(what), "{shortcomings:?}");
            assert!(figures.block().contains("FAIL"));
        }
    }
}
