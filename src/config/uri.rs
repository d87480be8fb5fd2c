//! Checks MongoDB URIs without asking the network and without repeating them: they hold passwords.

use mongodb::options::ConnectionString;

/// Whether the driver will take this URI. The error never contains any part of it.
///
/// An SRV name is not looked up: the daemon must start while the link is down.
pub(super) fn check(uri: &str) -> Result<(), String> {
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Err("must start with mongodb:// or mongodb+srv://".into());
    };
    if !["mongodb", "mongodb+srv"].contains(&scheme) {
        return Err("must start with mongodb:// or mongodb+srv://".into());
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    if rest[end..].contains('@') && !rest[end..].contains('?') {
        return Err(SPECIAL_CHARACTERS.into());
    }
    let hosts = match rest[..end].rsplit_once('@') {
        Some((user_info, hosts)) => {
            if user_info.contains('@') || user_info.matches(':').count() > 1 {
                return Err(SPECIAL_CHARACTERS.into());
            }
            hosts
        }
        None => &rest[..end],
    };
    if hosts.is_empty() {
        return Err("names no server: it must read mongodb://USER:PASSWORD@SERVER/".into());
    }
    if scheme == "mongodb+srv" && hosts.contains([':', ',']) {
        return Err(
            "starts with mongodb+srv://, so it must name one server, without a port".into(),
        );
    }
    if ["<password>", "<db_password>", "USER:PASSWORD"]
        .iter()
        .any(|sample| rest.contains(sample))
    {
        return Err(
            "still has the placeholder for the password in it; put the real one there".into(),
        );
    }
    ConnectionString::parse(uri).map(drop).map_err(|_| {
        "is not a valid MongoDB URI (it is not shown here, for it may hold a password). Check the \
         server names, their ports, the options after the `?`, and that special characters in the \
         password are written as %XX"
            .into()
    })
}

const SPECIAL_CHARACTERS: &str = "has a special character in the user name or password (it is not \
    shown here). Write @ as %40, : as %3A, / as %2F, ? as %3F, # as %23, % as %25";

/// Whether whoever reads a URI learns a password from it.
pub(crate) fn holds_password(uri: &str) -> bool {
    redact(uri).contains("***") || uri.to_ascii_lowercase().contains("password=")
}

/// The URI for people: scheme, servers and path, without user, password and options.
pub(crate) fn redact(uri: &str) -> String {
    let Some((scheme, rest)) = uri.split_once("://") else {
        return if uri.is_empty() {
            String::new()
        } else {
            "***".into()
        };
    };
    match rest.split_once('?') {
        Some((_, options)) if options.contains('@') => return format!("{scheme}://***"),
        _ => {}
    }
    let rest = rest.split_once('?').map_or(rest, |(before, _)| before);
    match rest.rsplit_once('@') {
        Some((_, hosts)) => format!("{scheme}://***@{hosts}"),
        None => format!("{scheme}://{rest}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_told_from_other_options() {
        for uri in [
            "mongodb://user:secret@host/?replicaSet=rs0",
            "mongodb://host/?tls=true&tlsCertificateKeyFilePassword=secret",
            "mongodb://host/?authMechanismProperties=x:a@b",
        ] {
            assert!(holds_password(uri), "{uri}");
        }
        for uri in ["mongodb://host:27017/?replicaSet=rs0", "mongodb://host", ""] {
            assert!(!holds_password(uri), "{uri}");
        }
    }
}
