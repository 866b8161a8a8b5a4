"""KuaiRand (Gao et al., CIKM 2022): readers, checks, public splits, download, conversion."""
