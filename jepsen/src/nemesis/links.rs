//! Links: cut both ways or one way, slow, reset. Owns the shapes of partitions.

use tokio::time::Instant;

use super::Nemesis;

impl Nemesis<'_> {
    /// Cuts links and heals them, until the end.
    pub(super) async fn cut_links(&self, end: Instant) {
        if !self.mix.partitions {
            return;
        }
        while self.pause(500, 4_000, end).await {
            let nodes = self.names();
            match self.below(8) {
                0..=2 => self.isolate(self.some_leader(), "leader isolated"),
                3 => self.isolate(self.any_node(), "node isolated"),
                4..=5 => self.split(),
                6 => {
                    let (deaf, other) = (self.some_leader(), self.any_node());
                    self.note("one-way cut");
                    self.trace.event(format_args!("n{} hears nothing", deaf + 1));
                    for from in nodes.iter().filter(|name| **name != nodes[deaf]) {
                        if other == deaf || *from == nodes[other] {
                            self.cluster.net.block(from, &nodes[deaf]);
                        }
                    }
                }
                _ => {
                    let (one, other) = (self.some_leader(), self.any_node());
                    self.note("partial cut");
                    self.cut(&nodes[one], &nodes[other]);
                }
            }
            self.pause(200, 5_000, end).await;
            self.trace.event(format_args!("links are healed"));
            self.cluster.net.heal();
        }
    }

    fn cut(&self, one: &str, other: &str) {
        self.trace.event(format_args!("{one} and {other} are cut off from each other"));
        self.cluster.net.block(one, other);
        self.cluster.net.block(other, one);
    }

    /// From the other nodes, and in one of two cases from the clients as well.
    fn isolate(&self, at: usize, kind: &'static str) {
        self.note(kind);
        let nodes = self.names();
        let mut others: Vec<String> = nodes.clone();
        if self.one_in(2) {
            others.extend(self.clients.iter().cloned());
        }
        for other in others.iter().filter(|other| **other != nodes[at]) {
            self.cut(&nodes[at], other);
        }
    }

    /// In two halves, clients on either side.
    fn split(&self) {
        self.note("split in two");
        let mut hosts = self.names();
        hosts.extend(self.clients.iter().cloned());
        let sides: Vec<bool> = hosts.iter().map(|_| self.one_in(2)).collect();
        for (one, left) in hosts.iter().zip(&sides) {
            for (other, right) in hosts.iter().zip(&sides) {
                if *left && !*right {
                    self.cut(one, other);
                }
            }
        }
    }

    /// Resets connections, and makes links slow for a while, until the end.
    pub(super) async fn shake_links(&self, end: Instant) {
        if !self.mix.flaky_links {
            return;
        }
        while self.pause(500, 3_000, end).await {
            let mut hosts = self.names();
            hosts.extend(self.clients.iter().cloned());
            let one = self.cluster.name(self.any_node());
            let other = hosts[self.below(hosts.len() as u64) as usize].clone();
            if self.one_in(2) {
                self.note("connections reset");
                self.trace.event(format_args!("connections of {one} and {other} are reset"));
                self.cluster.net.reset(&one, &other);
                continue;
            }
            let times = [3, 10, 40][self.below(3) as usize];
            self.note("slow link");
            self.trace.event(format_args!("from {one} to {other} it takes {times} times as long"));
            self.cluster.net.slow(&one, &other, times);
            self.pause(200, 3_000, end).await;
            self.cluster.net.slow(&one, &other, 1);
        }
    }
}
