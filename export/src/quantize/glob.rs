//! Patterns for layers' names.

/// A pattern in which `*` stands for any characters and `?` for one. It must match a whole name, `unet.conv_in`
/// (component and layer) or `conv_in` (a layer of any component).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob(String);

impl Glob {
    /// The pattern `text`.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The pattern as it was given.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Whether layer `layer` of `component` is meant.
    #[must_use]
    pub fn is_of(&self, component: &str, layer: &str) -> bool {
        matches(self.0.as_bytes(), layer.as_bytes())
            || matches(self.0.as_bytes(), format!("{component}.{layer}").as_bytes())
    }
}

/// Whether all of `text` fits `pattern`: the last `*` seen takes one more byte whenever the rest does not fit.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match &mut star {
                None => return false,
                Some((after, from)) => {
                    *from += 1;
                    (p, t) = (*after, *from);
                }
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("conv_in", "conv_in", true),
            ("conv", "conv_in", false),
            ("conv*", "conv_in", true),
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("?", "", false),
            ("up_blocks.?.*.conv1", "up_blocks.3.resnets.0.conv1", true),
            ("up_blocks.?.*.conv1", "up_blocks.3.resnets.0.conv2", false),
            ("*a*b", "xxaybab", true),
            ("*a*b", "xxaybabc", false),
            ("**", "x", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
        let glob = Glob::new("unet.down*");
        assert!(glob.is_of("unet", "down_blocks.0.conv"));
        assert!(!glob.is_of("decoder", "down_blocks.0.conv"));
        assert!(Glob::new("*.to_q").is_of("unet", "a.to_q"));
        // A pattern that takes exponential time with naive backtracking.
        assert!(!matches(b"*a*a*a*a*a*a*a*a*a*a*b", &[b'a'; 5000]));
    }
}
