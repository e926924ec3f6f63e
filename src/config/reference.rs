//! The reference page of all settings, generated from their documentation.

use std::fmt::Write as _;

use super::Config;

/// The text of `docs/configuration.md`. A test compares it with the file.
pub fn page() -> String {
    let mut out = String::from(
        "# Configuration\n\n\
         Generated from the documentation of the settings in `src/config.rs`; `thalweg check-config --reference` prints it.\n\n\
         Settings come from one TOML file (`thalweg serve --config FILE`, or the variable `THALWEG_CONFIG`), environment\n\
         variables and flags. A flag wins over a variable, a variable over the file, the file over the default. An unknown key\n\
         or variable is an error. `thalweg check-config` checks all of them and prints what holds.\n\n",
    );
    for field in Config::fields() {
        let variable = field.name.to_ascii_uppercase();
        let default = if field.default.is_empty() { "empty".to_owned() } else { format!("`{}`", field.default) };
        // Writing into a String does not fail.
        let _ = writeln!(out, "## `{}`\n", field.name);
        for line in field.doc.lines() {
            let _ = writeln!(out, "{}", line.trim());
        }
        let _ = writeln!(out, "\n- Value: {}\n- Default: {default}\n- Variable: `THALWEG_{variable}`\n", field.kind);
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}
