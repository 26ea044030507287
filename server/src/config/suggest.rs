//! Owns "did you mean": the nearest of the known words. Does not know what the words mean.

/// The known word that `wrong` most likely stands for, if any is near.
pub(super) fn nearest<'a>(wrong: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let wrong = wrong.to_ascii_lowercase();
    let near = known.filter_map(|word| {
        let distance = distance(&wrong, word);
        // A third of the letters: beyond it, two short words always "resemble" each other.
        (distance <= wrong.chars().count().max(word.chars().count()) / 3)
            .then_some((distance, word))
    });
    near.min_by_key(|(distance, _)| *distance).map(|(_, word)| word)
}

/// The known key (`section.name`) that `wrong` most likely stands for: a typing error, the right name
/// in the wrong section, or a part of the name.
pub(super) fn nearest_key<'a>(
    wrong: &str,
    known: impl Iterator<Item = &'a str> + Clone,
) -> Option<&'a str> {
    if let Some(key) = nearest(wrong, known.clone()) {
        return Some(key);
    }
    let last = |key: &'a str| key.rsplit('.').next().unwrap_or(key);
    let (section, name) = wrong.split_once('.').unwrap_or(("", wrong));
    if name.is_empty() {
        return None;
    }
    let mut by_name = known.clone().filter(|key| last(key) == name);
    let mut by_part = known.filter(|key| key.starts_with(section) && last(key).contains(name));
    by_name.next().or_else(|| by_part.next())
}

/// Levenshtein's, with a swap of neighbours as one step.
fn distance(left: &str, right: &str) -> usize {
    let (left, right): (Vec<char>, Vec<char>) = (left.chars().collect(), right.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=right.len()).collect();
    for i in 1..=left.len() {
        let mut row = vec![i];
        for j in 1..=right.len() {
            let same = usize::from(left[i - 1] != right[j - 1]);
            let mut least = (above[j - 1] + same).min(above[j] + 1).min(row[j - 1] + 1);
            let swapped =
                i > 1 && j > 1 && left[i - 1] == right[j - 2] && left[i - 2] == right[j - 1];
            if swapped {
                least = least.min(before[j - 2] + 1);
            }
            row.push(least);
        }
        before = std::mem::replace(&mut above, row);
    }
    above[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_found_and_a_far_one_is_not() {
        let words = ["info", "debug", "trace"];
        assert_eq!(nearest("inof", words.into_iter()), Some("info"));
        assert_eq!(nearest("DEBUG", words.into_iter()), Some("debug"));
        assert_eq!(nearest("verbose", words.into_iter()), None);
    }

    #[test]
    fn keys_are_found_by_name_and_by_part() {
        let keys = ["raft.heartbeat_interval", "listen.client", "node.zone"];
        let find = |wrong| nearest_key(wrong, keys.into_iter());
        assert_eq!(find("raft.heartbeat_intervall"), Some("raft.heartbeat_interval"));
        assert_eq!(find("server_settings.zone"), Some("node.zone"));
        assert_eq!(find("raft.heartbeat"), Some("raft.heartbeat_interval"));
        assert_eq!(find("quota.bytes"), None);
    }

    #[test]
    fn distances() {
        for (left, right, steps) in
            [("", "abc", 3), ("abc", "abc", 0), ("abcd", "abdc", 1), ("kitten", "sitting", 3)]
        {
            assert_eq!(distance(left, right), steps, "{left} {right}");
        }
    }
}
