//! Reads the file, `.env`, credentials and environment, in this order of precedence from low to
//! high, into checked values that know where they came from.

use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::keys::{DEFAULTS, KEYS, Key};
use super::value::{self, Value};

/// Why the configuration can't be used: one paragraph with cause and remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}{message}")]
pub struct ConfigError {
    /// `sangam.toml, line 12: `, or empty.
    place: String,
    message: String,
}

impl ConfigError {
    /// Exit code of a program that was given this configuration (`EX_CONFIG`).
    pub const EXIT_CODE: u8 = 78;

    pub(super) fn new(message: impl Into<String>) -> Self {
        Self {
            place: String::new(),
            message: message.into(),
        }
    }
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// The configuration file, at this line.
    File {
        /// Counted from 1.
        line: usize,
    },
    /// An environment variable, or a line of `.env`.
    Environment {
        /// Its name.
        variable: &'static str,
        /// Whether it was read from `.env`.
        dotenv: bool,
    },
    /// A systemd credential.
    Credential(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { line } => write!(f, "file, line {line}"),
            Self::Environment {
                variable,
                dotenv: false,
            } => write!(f, "environment, {variable}"),
            Self::Environment {
                variable,
                dotenv: true,
            } => write!(f, ".env, {variable}"),
            Self::Credential(name) => write!(f, "credential, {name}"),
        }
    }
}

/// One value and where it came from.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    pub key: &'static Key,
    pub value: Value,
    pub origin: Origin,
}

/// All values by path; a collection's name is one segment whatever characters it has.
#[derive(Clone, Debug, Default)]
pub(super) struct Settings {
    pub file: Option<PathBuf>,
    pub values: BTreeMap<Vec<String>, Setting>,
}

/// What surrounds the process; a value of its own so that tests need not change the real one.
#[derive(Clone, Debug, Default)]
pub(super) struct Surroundings {
    pub variables: BTreeMap<String, String>,
    pub directory: PathBuf,
}

impl Surroundings {
    pub(super) fn of_this_process() -> Self {
        Self {
            variables: std::env::vars_os()
                .filter_map(|(name, value)| {
                    Some((name.into_string().ok()?, value.into_string().ok()?))
                })
                .collect(),
            directory: std::env::current_dir().unwrap_or_default(),
        }
    }

    /// A variable that is set and not empty.
    fn variable(&self, name: &str) -> Option<&str> {
        self.variables
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    /// The file to read: the one named, else the first that exists.
    fn find_file(&self, named: Option<&Path>) -> Option<PathBuf> {
        let named = named
            .map(Path::to_owned)
            .or_else(|| self.variable(super::FILE_VARIABLE).map(PathBuf::from));
        if let Some(path) = named {
            return Some(self.directory.join(path));
        }
        [
            "sangam.toml",
            "config/sangam.toml",
            "/etc/sangam/sangam.toml",
        ]
        .iter()
        .map(|name| self.directory.join(name))
        .find(|path| path.is_file())
    }
}

impl Settings {
    pub(super) fn load(named: Option<&Path>, around: &Surroundings) -> Result<Self, ConfigError> {
        let mut settings = Self::defaults();
        if let Some(path) = around.find_file(named) {
            let text = std::fs::read_to_string(&path).map_err(|error| unreadable(&path, &error))?;
            settings.add_toml(&text, &path.display().to_string())?;
            settings.file = Some(path);
        }
        settings.add_dotenv(around)?;
        settings.add_credentials(around)?;
        settings.add_variables(around)?;
        Ok(settings)
    }

    /// The values of the example file, but for keys that must be named.
    pub(super) fn defaults() -> Self {
        let mut settings = Self::default();
        settings
            .add_toml(DEFAULTS, "config/sangam.toml")
            .expect("the example compiled in is valid: a test parses it");
        settings.values.remove(&vec!["database".to_owned()]);
        for setting in settings.values.values_mut() {
            setting.origin = Origin::Default;
        }
        settings
    }

    pub(super) fn add_toml(&mut self, text: &str, name: &str) -> Result<(), ConfigError> {
        let document = DeTable::parse(text).map_err(|error| ConfigError {
            place: place(name, text, &error.span().unwrap_or(0..0)),
            // The parser's message names tokens it wanted, never the file's content.
            message: format!("this is not TOML: {}", error.message().replace('\n', "; ")),
        })?;
        let mut walk = Walk {
            text,
            name,
            settings: self,
        };
        walk.table(&[], document.get_ref())
    }

    fn add_dotenv(&mut self, around: &Surroundings) -> Result<(), ConfigError> {
        let beside = self
            .file
            .as_ref()
            .and_then(|file| Some(file.parent()?.join(".env")));
        let path = [Some(around.directory.join(".env")), beside]
            .into_iter()
            .flatten()
            .find(|path| path.is_file());
        let Some(path) = path else { return Ok(()) };
        let entries = dotenvy::from_path_iter(&path)
            .and_then(Iterator::collect::<Result<Vec<(String, String)>, _>>)
            .map_err(|_| {
                // dotenvy's error repeats the line, which may hold a password.
                ConfigError::new(format!(
                    "{}: a line of it can't be read; each must be NAME=value, with the value in \
                     single quotes if it has spaces, $ or #",
                    path.display()
                ))
            })?;
        for key in KEYS {
            let Some(variable) = key.env else { continue };
            let value = entries
                .iter()
                .rev()
                .find(|(name, value)| name == variable && !value.is_empty());
            if let Some((_, value)) = value {
                let origin = Origin::Environment {
                    variable,
                    dotenv: true,
                };
                self.add_text(
                    key,
                    value,
                    &format!("{variable} in {}", path.display()),
                    origin,
                )?;
            }
        }
        Ok(())
    }

    fn add_credentials(&mut self, around: &Surroundings) -> Result<(), ConfigError> {
        let Some(directory) = around.variable(super::CREDENTIALS_VARIABLE) else {
            return Ok(());
        };
        for key in KEYS {
            let Some(name) = key.credential else { continue };
            let path = Path::new(directory).join(name);
            let text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(unreadable(&path, &error)),
            };
            if !text.trim().is_empty() {
                let what = format!("the systemd credential {name}");
                self.add_text(key, text.trim(), &what, Origin::Credential(name))?;
            }
        }
        Ok(())
    }

    fn add_variables(&mut self, around: &Surroundings) -> Result<(), ConfigError> {
        for key in KEYS {
            let Some(variable) = key.env else { continue };
            if let Some(value) = around.variable(variable) {
                let origin = Origin::Environment {
                    variable,
                    dotenv: false,
                };
                self.add_text(
                    key,
                    value,
                    &format!("the environment variable {variable}"),
                    origin,
                )?;
            }
        }
        Ok(())
    }

    fn add_text(
        &mut self,
        key: &'static Key,
        text: &str,
        what: &str,
        origin: Origin,
    ) -> Result<(), ConfigError> {
        let value = value::check_text(key.kind, text)
            .map_err(|message| ConfigError::new(format!("{what} {message}")))?;
        let path = key.path.iter().map(|&segment| segment.to_owned()).collect();
        self.values.insert(path, Setting { key, value, origin });
        Ok(())
    }

    /// The value at a path without wildcards.
    pub(super) fn get(&self, path: &[&str]) -> Option<&Setting> {
        self.values.get(
            &path
                .iter()
                .map(|&segment| segment.to_owned())
                .collect::<Vec<_>>(),
        )
    }

    /// `file, line N: ` of a value, for errors found after reading.
    pub(super) fn place(&self, path: &[&str]) -> String {
        match (self.get(path).map(|setting| &setting.origin), &self.file) {
            (Some(Origin::File { line }), Some(file)) => {
                format!("{}, line {line}: ", file.display())
            }
            _ => String::new(),
        }
    }

    /// An error about the value at `path`.
    pub(super) fn error(&self, path: &[&str], message: impl fmt::Display) -> ConfigError {
        ConfigError {
            place: self.place(path),
            message: format!("{} {message}", path.join(".")),
        }
    }
}

/// Goes through a parsed file, section by section.
struct Walk<'a> {
    text: &'a str,
    name: &'a str,
    settings: &'a mut Settings,
}

impl Walk<'_> {
    fn table(&mut self, parents: &[String], table: &DeTable<'_>) -> Result<(), ConfigError> {
        for (name, value) in table {
            let mut path = parents.to_vec();
            path.push(name.get_ref().to_string());
            let exact = KEYS.iter().find(|key| matches(key.path, &path));
            let is_section = KEYS
                .iter()
                .any(|key| key.path.len() > path.len() && matches(&key.path[..path.len()], &path));
            match (exact, value.get_ref()) {
                (Some(key), _) => self.value(key, path, value)?,
                (None, DeValue::Table(inner)) if is_section => self.table(&path, inner)?,
                (None, other) if is_section => {
                    let section = dotted(&path);
                    return Err(self.error(
                        value.span(),
                        format!(
                            "`{section}` must be a section, written as a line [{section}] with its \
                             keys below, but is {}",
                            value::type_name(other)
                        ),
                    ));
                }
                (None, _) => return Err(self.unknown(&path, name.span())),
            }
        }
        Ok(())
    }

    fn value(
        &mut self,
        key: &'static Key,
        path: Vec<String>,
        value: &Spanned<DeValue<'_>>,
    ) -> Result<(), ConfigError> {
        let checked = value::check(key.kind, value.get_ref()).map_err(|message| {
            self.error(value.span(), format!("`{}` {message}", dotted(&path)))
        })?;
        let origin = Origin::File {
            line: line(self.text, value.span().start),
        };
        self.settings.values.insert(
            path,
            Setting {
                key,
                value: checked,
                origin,
            },
        );
        Ok(())
    }

    fn unknown(&self, path: &[String], span: Range<usize>) -> ConfigError {
        let written = dotted(path);
        let last = path.last().map_or("", String::as_str);
        let depth = path.len();
        // Keys and sections that could stand in the same place, then the same name elsewhere.
        let siblings = KEYS.iter().filter(|key| {
            key.path.len() >= depth && matches(&key.path[..depth - 1], &path[..depth - 1])
        });
        let near = value::nearest(
            last,
            siblings
                .map(|key| key.path[depth - 1])
                .filter(|name| *name != "*"),
        )
        .map(|name| dotted(&[&path[..depth - 1], &[name.to_owned()]].concat()))
        .or_else(|| {
            KEYS.iter()
                .find(|key| key.path.last() == Some(&last))
                .map(|key| key.path.join("."))
        })
        .or_else(|| {
            let all: Vec<String> = KEYS.iter().map(|key| key.path.join(".")).collect();
            value::nearest(&written, all.iter().map(String::as_str)).map(str::to_owned)
        });
        let remedy = match near {
            Some(near) => format!("did you mean `{near}`?"),
            None => "`sangam config` lists the valid keys".to_owned(),
        };
        self.error(span, format!("there is no key `{written}`; {remedy}"))
    }

    fn error(&self, span: Range<usize>, message: String) -> ConfigError {
        ConfigError {
            place: place(self.name, self.text, &span),
            message,
        }
    }
}

fn matches(pattern: &[&str], path: &[String]) -> bool {
    pattern.len() == path.len()
        && pattern
            .iter()
            .zip(path)
            .all(|(pattern, name)| *pattern == "*" || pattern == name)
}

/// A path as it would be written in TOML.
pub(super) fn dotted(path: &[String]) -> String {
    let plain = |name: &str| {
        !name.is_empty()
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "_-".contains(c))
    };
    path.iter()
        .map(|name| {
            if plain(name) {
                name.clone()
            } else {
                format!("{name:?}")
            }
        })
        .collect::<Vec<_>>()
        .join(".")
}

fn line(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())]
        .iter()
        .filter(|&&byte| byte == b'\n')
        .count()
        + 1
}

fn place(name: &str, text: &str, span: &Range<usize>) -> String {
    format!("{name}, line {}: ", line(text, span.start))
}

fn unreadable(path: &Path, error: &std::io::Error) -> ConfigError {
    let remedy = match error.kind() {
        ErrorKind::NotFound => {
            "create it (config/sangam.toml is an example) or name another with --config"
        }
        ErrorKind::PermissionDenied => "let the user that runs sangam read it",
        ErrorKind::InvalidData => "save it as UTF-8 text",
        _ => "make it readable or name another with --config",
    };
    ConfigError::new(format!(
        "{} can't be read: {error}; {remedy}",
        path.display()
    ))
}
