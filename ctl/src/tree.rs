//! Text as a tree.

/// A line with those below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    line: String,
    below: Vec<Self>,
}

impl Tree {
    /// A line without any below it.
    pub fn leaf(line: impl Into<String>) -> Self {
        Self {
            line: line.into(),
            below: Vec::new(),
        }
    }

    /// A line with others below it.
    pub fn new(line: impl Into<String>, below: impl IntoIterator<Item = Self>) -> Self {
        Self {
            line: line.into(),
            below: below.into_iter().collect(),
        }
    }

    /// Appends the tree to a text, ending in a line break.
    pub fn write(&self, text: &mut String) {
        text.push_str(&self.line);
        text.push('\n');
        self.write_below("", text);
    }

    fn write_below(&self, indent: &str, text: &mut String) {
        for (index, tree) in self.below.iter().enumerate() {
            let is_last = index + 1 == self.below.len();
            let (branch, space) = if is_last {
                ("└─ ", "   ")
            } else {
                ("├─ ", "│  ")
            };
            text.push_str(&format!("{indent}{branch}{}\n", tree.line));
            tree.write_below(&format!("{indent}{space}"), text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_are_drawn() {
        let mut text = String::new();
        let tree = Tree::new(
            "a",
            [
                Tree::new("b", [Tree::leaf("c"), Tree::leaf("d")]),
                Tree::new("e", [Tree::leaf("f")]),
            ],
        );
        tree.write(&mut text);
        assert_eq!(text, "a\n├─ b\n│  ├─ c\n│  └─ d\n└─ e\n   └─ f\n");
    }
}
