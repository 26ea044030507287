//! Time: wall clocks that jump, and disks that take for ever. Owns how far and how long.

use tokio::time::Instant;

use super::Nemesis;

impl Nemesis<'_> {
    /// Lets wall clocks jump, until the end.
    pub(super) async fn set_clocks(&self, end: Instant) {
        if !self.mix.clocks {
            return;
        }
        while self.pause(500, 5_000, end).await {
            let at = if self.one_in(2) { self.some_leader() } else { self.any_node() };
            let far = [50, 400, 3_000, 60_000][self.below(4) as usize];
            let by_ms = 1 + self.below(far) as i64;
            let by_ms = if self.one_in(2) { -by_ms } else { by_ms };
            self.note("clock jump");
            self.trace.event(format_args!("the clock of n{} jumps by {by_ms} ms", at + 1));
            self.cluster.clock(at).jump(by_ms);
            self.pause(200, 4_000, end).await;
            self.cluster.clock(at).set_right();
        }
    }

    /// Lets disks hang, until the end.
    pub(super) async fn stall_disks(&self, end: Instant) {
        if !self.mix.stalls {
            return;
        }
        while self.pause(1_000, 6_000, end).await {
            let at = if self.one_in(2) { self.some_leader() } else { self.any_node() };
            // Most end before anybody minds; one in eight is longer than a process lives with.
            let most_ms =
                if self.one_in(8) { 25_000 } else { [300, 1_500, 4_000][self.below(3) as usize] };
            self.note("disk stall");
            self.trace.event(format_args!("the disk of n{} hangs", at + 1));
            self.stalled.borrow_mut().insert(at);
            self.cluster.disk(at).stall(true);
            self.pause(most_ms / 2, most_ms, end).await;
            self.cluster.disk(at).stall(false);
            self.trace.event(format_args!("the disk of n{} works again", at + 1));
        }
    }
}
