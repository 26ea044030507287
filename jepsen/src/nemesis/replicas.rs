//! Read replicas that come and go while everything else goes wrong. No fault, but work that faults
//! interrupt. Owns how many are asked for, and when.

use std::time::Duration;

use tokio::time::Instant;

use super::Nemesis;

/// A setting is asked for once; without an answer nobody knows whether it holds.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

impl Nemesis<'_> {
    /// Sets the read replicas anew now and then, until the end.
    pub(super) async fn set_read_replicas(&self, end: Instant) {
        if !self.mix.replicas {
            return;
        }
        let client = match self.cluster.client("operator").connect_lazy() {
            Ok(client) => client,
            Err(error) => {
                self.unexplained.borrow_mut().push(format!("the operator's client: {error}"));
                return;
            }
        };
        while self.pause(300, 5_000, end).await {
            let zone = ["", "z0", "z1"][self.below(3) as usize];
            let learners = self.below(3) as u32;
            self.note("read replicas set");
            self.trace.event(format_args!("{learners} read replicas in zone {zone:?}"));
            let asked = client.admin();
            let asked = asked.set_read_replicas(zone, learners, false);
            // Answered or not: the next one is another.
            let _ = tokio::time::timeout(ASK_TIMEOUT, asked).await;
        }
        client.close().await;
    }
}
